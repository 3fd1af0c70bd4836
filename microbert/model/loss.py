"""Cross-entropy over masked positions, normalised by the global count of masked tokens.

Within, numbers are powers of 2 rather than of e, which a CPU computes twice as fast.
Shapes: N masked slots of a batch, D = n_embed, V vocabulary, C slots a chunk.
"""

import ctypes
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from microbert.data.masking import IGNORED
from microbert.kernels.compile import KERNELS, address, compiled_kernel, n_threads
from microbert.runtime.device import is_for_kernels
from microbert.runtime.torch_compile import compiled

SOURCE = KERNELS / "loss.c"
LANES, BLOCK = 16, 4  # what loss.c wants rows and columns of its weights to be multiples of
THIN = 16  # up to this D it computes the products too; where it is missing, PyTorch multiplies by weights that are laid out as [D, V], up to four times as fast
# logits in memory at a time: 5 MB in fp32, which a CPU's caches hold; on a GPU 268 MB, rows enough to keep it busy
CHUNK_ELEMENTS = {"cpu": 1_280_000, "cuda": 2**26}
LEAST_ROWS, LEAST_ROWS_WIDE = (
    128,
    320,
)  # so that a large vocabulary's weights, which no cache holds, are read for enough of them; the second for D > THIN
LOG2_E = 1 / math.log(2)  # exp(x) = 2^(x LOG2_E)


def chunk_rows(device_type: str, vocab_size: int, n_embed: int) -> int:
    """C: the masked slots whose logits are in memory at a time."""
    return max(
        LEAST_ROWS if n_embed <= THIN else LEAST_ROWS_WIDE,
        CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cpu"]) // vocab_size,
    )


class _CrossEntropy(torch.autograd.Function):
    """sum of -log softmax(hidden @ weight.T + bias)[label], with the gradients computed in the forward pass.

    Logits exist for one chunk of slots at a time and are turned into their own gradient in place, so memory is O(C x V), and
    each logit passes through the cache once. The idea is that of Cut Your Losses (Wijmans et al. 2024, arXiv:2411.09009) and
    Liger Kernel (Hsu et al. 2024, arXiv:2410.10989). With a narrower dtype the matrices are multiplied in it, and everything else
    stays as it is.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, dtype: torch.dtype | None, is_compiled: bool
    ) -> Tensor:
        dtype = dtype or hidden.dtype
        kernel = (
            compiled_kernel(SOURCE)
            if is_for_kernels(hidden, weight, bias) and dtype in (torch.float32, torch.bfloat16)
            else None
        )
        if kernel is not None and len(labels) and labels.max() >= len(weight):
            raise IndexError(f"a label is {labels.max()}, and the vocabulary has {len(weight)} tokens")
        if kernel is not None and weight.shape[1] <= THIN:
            loss, *gradients = _thin(kernel, hidden.contiguous(), weight, bias, labels.contiguous())
        else:
            loss, *gradients = _in_chunks(kernel, hidden, weight, bias, labels.contiguous(), dtype, is_compiled)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        hidden_grad, weight_grad, bias_grad = (
            ctx.saved_tensors
        )  # which nobody reads again, so that they need not be copied
        return hidden_grad.mul_(loss_grad), weight_grad.mul_(loss_grad), bias_grad.mul_(loss_grad), None, None, None


def _in_chunks(
    kernel: ctypes.CDLL | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    is_compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the gradients of hidden, weight and bias. dtype: in which matrices are multiplied. is_compiled: as for masked_loss."""
    vocab_size, n_embed = weight.shape
    if n_embed <= THIN:
        weight = weight.T.contiguous().T
    chunk = max(1, min(chunk_rows(hidden.device.type, vocab_size, n_embed), len(labels)))
    if is_compiled and kernel is None:
        chunk = _even(chunk, len(labels))
    narrow_weight, buffer = weight.to(dtype), hidden.new_empty(chunk, vocab_size, dtype=dtype)
    softmax = (
        _KernelSoftmax(kernel, bias)
        if kernel is not None
        else _CompiledSoftmax(bias)
        if is_compiled
        else _TorchSoftmax(bias, buffer)
    )
    hidden_grad, loss_2 = torch.empty_like(hidden), hidden.new_zeros(())
    weight_grad = weight.new_zeros(
        n_embed, vocab_size
    )  # transposed: twice as fast for a narrow D, no slower for a wide one
    for start in range(0, len(labels), chunk):
        h, y = hidden[start : start + chunk], labels[start : start + chunk]  # [C, D], [C]
        logits = torch.mm(h.to(dtype), narrow_weight.T, out=buffer[: len(h)])  # [C, V], without bias
        chunk_loss, row_factor = softmax(
            logits, y
        )  # and gradients in their place, but for the factor of each row, which is left to the narrow side
        loss_2 += chunk_loss
        hidden_grad[start : start + chunk] = torch.mm(logits, narrow_weight) * row_factor
        scaled = (h * row_factor).to(dtype).T
        if dtype == weight.dtype:
            weight_grad.addmm_(scaled, logits)
        else:
            weight_grad += torch.mm(scaled, logits)
    return loss_2 / LOG2_E, hidden_grad, weight_grad.T, softmax.bias_grad


def _even(chunk: int, n_rows: int) -> int:
    """A chunk no larger into which the rows go without a rest, where there is one not much smaller: each size is compiled for itself."""
    least = max(1, -(-n_rows // chunk))
    return max(1, -(-n_rows // next((n for n in range(least, 2 * least) if n_rows % n == 0), least)))


class _TorchSoftmax:
    """Turns the logits of a chunk, without bias, into their gradients but for a factor of each row. `bias_grad` adds up."""

    def __init__(self, bias: Tensor, buffer: Tensor) -> None:
        self.bias_2, self.bias_grad = bias * LOG2_E, torch.zeros_like(bias)
        self._wide = buffer if buffer.dtype == bias.dtype else torch.empty_like(buffer, dtype=bias.dtype)

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits: [C, V], overwritten. labels: int64 [C]. Returns the loss in units of ln 2: [], and the factors: [C, 1]."""
        used = (labels != IGNORED).to(self.bias_2.dtype)[:, None]
        target = labels.clamp_min(0)[:, None]
        wide = torch.add(self.bias_2, logits, alpha=LOG2_E, out=self._wide[: len(logits)])
        wide -= wide.amax(dim=1, keepdim=True)
        target_logit = wide.gather(1, target)
        exponentials = wide.exp2_()
        total = exponentials.sum(dim=1, keepdim=True)
        row_factor = used / total
        # d loss / d logits is (exponentials / total - one-hot) * used
        gradient = exponentials.scatter_add_(1, target, -total)
        self.bias_grad.addmv_(gradient.T, row_factor[:, 0])
        if logits.dtype != gradient.dtype:
            logits.copy_(gradient)
        return ((total.log2() - target_logit) * used).sum(), row_factor


class _CompiledSoftmax:
    """The same as _TorchSoftmax by torch.compile, which goes through memory as often as rows and columns have to be added up, and no more."""

    def __init__(self, bias: Tensor) -> None:
        self._bias_2, self.bias_grad = bias * LOG2_E, torch.zeros_like(bias)

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As _TorchSoftmax."""
        loss, row_factor, bias_grad = _compiled_softmax()(logits, self._bias_2, labels)
        self.bias_grad += bias_grad
        return loss, row_factor


def _softmax(logits: Tensor, bias_2: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits: [C, V], overwritten. bias_2: [V], in units of ln 2. labels: int64 [C]. Returns loss: [], factors: [C, 1], and the gradient of the bias: [V]."""
    used = (labels != IGNORED).to(bias_2.dtype)[:, None]
    target = labels.clamp_min(0)[:, None]
    wide = bias_2 + logits.to(bias_2.dtype) * LOG2_E
    wide = wide - wide.amax(dim=1, keepdim=True)
    exponentials = wide.exp2()
    total = exponentials.sum(dim=1, keepdim=True)
    row_factor = used / total
    is_target = torch.arange(logits.shape[1], device=logits.device) == target
    gradient = torch.where(is_target, exponentials - total, exponentials)
    loss = ((total.log2() - wide.gather(1, target)) * used).sum()
    bias_grad = (gradient * row_factor).sum(dim=0)
    logits.copy_(gradient)
    return loss, row_factor, bias_grad


@functools.cache
def _compiled_softmax() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Made when it is first needed: torch's compiler takes a second to load."""
    return compiled(_softmax, dynamic=False)


class _KernelSoftmax:
    """The same as _TorchSoftmax by loss.c, in one pass through memory."""

    def __init__(self, kernel: ctypes.CDLL, bias: Tensor) -> None:
        self._kernel, self._bias_2 = kernel, _padded(bias * LOG2_E, -math.inf)
        self._bias_grad = bias.new_zeros(len(self._bias_2))
        self.bias_grad = self._bias_grad[: len(bias)]

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As _TorchSoftmax; logits in fp32 or bf16."""
        n_rows, vocab_size = logits.shape
        stride, threads = len(self._bias_2), n_threads()
        row_factor, bias_grad = self._bias_2.new_empty(n_rows, 1), torch.empty_like(self._bias_2)
        losses = self._bias_2.new_empty(threads.value, dtype=torch.float64)
        room = self._bias_2.new_empty(threads.value * self._kernel.scratch(0, ctypes.c_long(stride)))
        self._kernel.softmax_of(
            threads,
            *map(ctypes.c_long, (n_rows, vocab_size, stride)),
            address(logits),
            ctypes.c_int(logits.dtype == torch.bfloat16),
            *map(address, (self._bias_2, labels, row_factor, bias_grad, losses, room)),
        )
        self._bias_grad += bias_grad
        return losses.sum(), row_factor


def _thin(
    kernel: ctypes.CDLL, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the gradients of hidden, weight and bias; all by loss.c, which keeps a few slots' logits at a time."""
    (vocab_size, n_embed), n_slots = weight.shape, len(hidden)
    bias_2 = _padded(bias * LOG2_E, -math.inf)
    stride, width = len(bias_2), -(-n_embed // BLOCK) * BLOCK
    columns = weight.new_zeros(width, stride)
    columns[:n_embed, :vocab_size] = weight.T
    hidden_grad, gradients = torch.empty_like(hidden), weight.new_empty(width + 1, stride)
    of_a_thread = kernel.scratch(ctypes.c_int(width), ctypes.c_long(stride))
    # no more threads than have room where a chunk of logits would be
    threads = max(
        1, min(torch.get_num_threads(), min(chunk_rows("cpu", vocab_size, n_embed), n_slots) * stride // of_a_thread)
    )
    losses, room = weight.new_empty(threads, dtype=torch.float64), weight.new_empty(threads * of_a_thread)
    kernel.thin(
        ctypes.c_int(threads),
        ctypes.c_long(n_slots),
        ctypes.c_int(n_embed),
        ctypes.c_int(width),
        ctypes.c_long(stride),
        *map(address, (hidden, columns, bias_2, labels, hidden_grad, gradients, losses, room)),
    )
    return (
        (losses.sum() / LOG2_E).to(hidden.dtype),
        hidden_grad,
        gradients[:n_embed, :vocab_size].T,
        gradients[width, :vocab_size],
    )


def _padded(x: Tensor, value: float) -> Tensor:
    """x: [V]. With as many of the value behind it as make whole vectors."""
    return torch.nn.functional.pad(x, (0, -len(x) % LANES), value=value)


def masked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    n_masked: int,
    dtype: torch.dtype | None = None,
    is_compiled: bool = False,
) -> Tensor:
    """The batch's share of the mean loss, in nats a masked token: shares of micro-batches and ranks add up.

    hidden: [N, D]. weight: [V, D]. bias: [V]. labels: int64 [N], IGNORED for empty slots. n_masked: the masked tokens of the
    whole global batch. dtype: in which matrices are multiplied; that of hidden when None. is_compiled: whether torch.compile may translate what is not by
    a kernel of ours. On a CPU raises IndexError for a label beyond the vocabulary.
    """
    return _CrossEntropy.apply(hidden, weight, bias, labels, dtype, is_compiled) / max(1, n_masked)


@torch.no_grad()
def masked_scores(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the summed loss in nats and the number of tokens predicted correctly. Shapes as for masked_loss.

    The chunks are summed in float64 on the CPU, because Apple's GPUs have no float64.
    """
    used = labels != IGNORED
    hidden, labels = hidden[used], labels[used]
    losses, n_correct = [], []
    chunk = chunk_rows(hidden.device.type, *weight.shape)
    for h, y in zip(hidden.split(chunk), labels.split(chunk)):
        logits = torch.addmm(bias, h, weight.T)
        losses.append(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
        n_correct.append((logits.argmax(dim=1) == y).sum())
    total = 0.0
    for loss in torch.stack(losses).tolist():  # not sum(), which rounds differently from Python 3.12 on
        total += loss
    return total, int(torch.stack(n_correct).sum())
