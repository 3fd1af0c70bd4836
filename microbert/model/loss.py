"""Cross-entropy over masked positions, normalised by the global count of masked tokens.

The softmax uses powers of 2, not of e, because a CPU computes them twice as fast.
Shapes: N masked slots of a batch, D = n_embed, V vocabulary, C slots of a chunk.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from microbert.data.masking import IGNORED
from microbert.kernels.compile import KERNELS, address, compiled_kernel, n_threads
from microbert.runtime.device import is_for_kernels
from microbert.runtime.torch_compile import compiled

SOURCE = KERNELS / "loss.c"
LANES, BLOCK = 16, 4  # loss.c requires multiples of these: columns and rows of its weights [D, V]
# up to this D, loss.c computes the matrix products too; without it, PyTorch multiplies by weights in the memory layout
# [D, V], up to four times as fast
THIN = 16
# logits in memory at a time: on a CPU 5 MB in fp32, which its caches hold; on a GPU 268 MB, enough rows to keep it busy
CHUNK_ELEMENTS = {"cpu": 1_280_000, "cuda": 2**26}
# rows of a chunk, at least: the weights of a large vocabulary fit no cache, so each read of them must serve many rows
LEAST_ROWS = 128
LEAST_ROWS_WIDE = 320  # for D > THIN
LOG2_E = 1 / math.log(2)  # exp(x) = 2^(x LOG2_E)


def chunk_rows(device_type: str, vocab_size: int, n_embed: int) -> int:
    """Return C, the number of masked slots whose logits are in memory at a time."""
    return max(
        LEAST_ROWS if n_embed <= THIN else LEAST_ROWS_WIDE,
        CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cpu"]) // vocab_size,
    )


class _CrossEntropy(torch.autograd.Function):
    """The sum of -log softmax(hidden @ weight.T + bias)[label]. The forward pass computes the gradients too.

    Logits exist for one chunk of slots at a time and are replaced by their gradients in place, so memory is O(C x V)
    and each logit passes through the cache once, as in Cut Your Losses (Wijmans et al. 2024, arXiv:2411.09009) and
    Liger Kernel (Hsu et al. 2024, arXiv:2410.10989). dtype: of the matrix products only.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        dtype: torch.dtype | None,
        is_compiled: bool,
        varies: bool,
    ) -> Tensor:
        dtype = dtype or hidden.dtype
        is_supported = is_for_kernels(hidden, weight, bias) and dtype in (torch.float32, torch.bfloat16)
        kernel = compiled_kernel(SOURCE) if is_supported else None
        if kernel is not None and len(labels) and labels.max() >= len(weight):
            raise IndexError(f"label {labels.max()} is out of range for a vocabulary of {len(weight)} tokens")
        if kernel is not None and weight.shape[1] <= THIN:
            loss, *gradients = _thin(kernel, hidden.contiguous(), weight, bias, labels.contiguous())
        else:
            loss, *gradients = _in_chunks(kernel, hidden, weight, bias, labels.contiguous(), dtype, is_compiled, varies)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors  # not read again, so scaled in place
        gradients = hidden_grad.mul_(loss_grad), weight_grad.mul_(loss_grad), bias_grad.mul_(loss_grad)
        return *gradients, None, None, None, None


def _in_chunks(
    kernel: ctypes.CDLL | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    is_compiled: bool,
    varies: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, and the gradients of hidden, weight and bias. dtype to varies: as for masked_loss."""
    vocab_size, n_embed = weight.shape
    if n_embed <= THIN:
        weight = weight.T.contiguous().T
    chunk = max(1, min(chunk_rows(hidden.device.type, vocab_size, n_embed), len(labels)))
    if is_compiled and kernel is None:
        chunk = _even_chunk(chunk, len(labels))
    narrow_weight, buffer = weight.to(dtype), hidden.new_empty(chunk, vocab_size, dtype=dtype)
    softmax: _Softmax
    if kernel is not None:
        softmax = _KernelSoftmax(kernel, bias)
    else:
        softmax = _CompiledSoftmax(bias, varies) if is_compiled else _TorchSoftmax(bias, buffer)
    hidden_grad, loss_2 = torch.empty_like(hidden), hidden.new_zeros(())
    # transposed: twice as fast for a narrow D, as fast for a wide one
    weight_grad = weight.new_zeros(n_embed, vocab_size)
    for start in range(0, len(labels), chunk):
        h, y = hidden[start : start + chunk], labels[start : start + chunk]  # [C, D], [C]
        logits = torch.mm(h.to(dtype), narrow_weight.T, out=buffer[: len(h)])  # [C, V], without bias
        # replaces the logits by gradients up to a factor of each row, which is applied on the narrow side
        chunk_loss, row_factor = softmax(logits, y)
        loss_2 += chunk_loss
        hidden_grad[start : start + chunk] = torch.mm(logits, narrow_weight) * row_factor
        scaled = (h * row_factor).to(dtype).T
        if dtype == weight.dtype:
            weight_grad.addmm_(scaled, logits)
        else:
            weight_grad += torch.mm(scaled, logits)
    return loss_2 / LOG2_E, hidden_grad, weight_grad.T, softmax.bias_grad


def _even_chunk(chunk: int, n_rows: int) -> int:
    """Return a chunk size of at most `chunk` that divides n_rows, unless it would be less than about half of `chunk`.

    Each size of a chunk is compiled separately.
    """
    least = max(1, -(-n_rows // chunk))
    return max(1, -(-n_rows // next((n for n in range(least, 2 * least) if n_rows % n == 0), least)))


class _Softmax(Protocol):
    """Replaces the logits of a chunk, without bias, by their gradients up to a factor of each row.

    `bias_grad` accumulates over the chunks.
    """

    bias_grad: Tensor

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits: [C, V], overwritten. labels: int64 [C]. Returns the loss: [], in units of ln 2; factors: [C, 1]."""
        ...


class _TorchSoftmax(_Softmax):
    """The softmax in PyTorch's operations."""

    def __init__(self, bias: Tensor, buffer: Tensor) -> None:
        self.bias_2, self.bias_grad = bias * LOG2_E, torch.zeros_like(bias)
        self._wide = buffer if buffer.dtype == bias.dtype else torch.empty_like(buffer, dtype=bias.dtype)

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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


class _CompiledSoftmax(_Softmax):
    """The softmax by torch.compile, which reads memory only as often as the sums of rows and columns require."""

    def __init__(self, bias: Tensor, varies: bool) -> None:
        self._bias_2, self.bias_grad, self._varies = bias * LOG2_E, torch.zeros_like(bias), varies

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, row_factor, bias_grad = _compiled_softmax(self._varies)(logits, self._bias_2, labels)
        self.bias_grad += bias_grad
        return loss, row_factor


def _softmax(logits: Tensor, bias_2: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss: [], factors: [C, 1], gradient of the bias: [V], as _Softmax. bias_2: [V], in units of ln 2."""
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
def _compiled_softmax(varies: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return `_softmax` for torch.compile, whose import takes a second. varies: as for masked_loss."""
    return compiled(_softmax, dynamic=None if varies else False)


class _KernelSoftmax(_Softmax):
    """The softmax by loss.c, in one pass through memory, for logits in fp32 or bf16."""

    def __init__(self, kernel: ctypes.CDLL, bias: Tensor) -> None:
        self._kernel, self._bias_2 = kernel, _padded(bias * LOG2_E, -math.inf)
        self._bias_grad = bias.new_zeros(len(self._bias_2))
        self.bias_grad = self._bias_grad[: len(bias)]

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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
    """Return the loss, and the gradients of hidden, weight and bias, by loss.c, a few slots at a time."""
    (vocab_size, n_embed), n_slots = weight.shape, len(hidden)
    bias_2 = _padded(bias * LOG2_E, -math.inf)
    stride, width = len(bias_2), -(-n_embed // BLOCK) * BLOCK
    columns = weight.new_zeros(width, stride)
    columns[:n_embed, :vocab_size] = weight.T
    hidden_grad, gradients = torch.empty_like(hidden), weight.new_empty(width + 1, stride)
    thread_scratch = kernel.scratch(ctypes.c_int(width), ctypes.c_long(stride))
    # no more threads than fit into the memory of a chunk of logits
    chunk = min(chunk_rows("cpu", vocab_size, n_embed), n_slots)
    threads = max(1, min(torch.get_num_threads(), chunk * stride // thread_scratch))
    losses, room = weight.new_empty(threads, dtype=torch.float64), weight.new_empty(threads * thread_scratch)
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
    """Return x: [V], padded with the value to whole vectors."""
    return torch.nn.functional.pad(x, (0, -len(x) % LANES), value=value)


def masked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    n_masked: int,
    dtype: torch.dtype | None = None,
    is_compiled: bool = False,
    varies: bool = False,
) -> Tensor:
    """Return the batch's share of the mean loss, in nats per masked token. Shares of micro-batches and ranks add up.

    hidden: [N, D]. weight: [V, D]. bias: [V]. labels: int64 [N], IGNORED for empty slots. n_masked: masked tokens of
    the whole global batch. dtype: of the matrix products; None for that of hidden. is_compiled: use torch.compile if
    there is no C kernel. varies: N is not the same in all calls, so that compiling for each takes too long. On a CPU,
    raises IndexError for a label beyond the vocabulary.
    """
    return _CrossEntropy.apply(hidden, weight, bias, labels, dtype, is_compiled, varies) / max(1, n_masked)


@torch.no_grad()
def masked_scores(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the summed loss in nats and the number of correctly predicted tokens. Shapes as for masked_loss.

    Chunks are summed in float64 on the CPU, because Apple's GPUs have no float64.
    """
    used = labels != IGNORED
    hidden, labels = hidden[used], labels[used]
    losses, n_correct = [], []
    chunk = chunk_rows(hidden.device.type, *weight.shape)
    for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = torch.addmm(bias, h, weight.T)
        losses.append(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
        n_correct.append((logits.argmax(dim=1) == y).sum())
    total = 0.0
    for loss in torch.stack(losses).tolist():  # not sum(), which rounds differently since Python 3.12
        total += loss
    return total, int(torch.stack(n_correct).sum())
