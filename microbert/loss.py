"""Cross-entropy over masked positions, normalised by the global count of masked tokens.

Within, numbers are powers of 2 rather than of e, which a CPU computes twice as fast.
Shapes: N masked slots of a batch, D = n_embed, V vocabulary, C slots a chunk.
"""

import math

import torch
from torch import Tensor

from .masking import IGNORED

# logits in memory at a time: 5 MB in fp32, which a CPU's caches hold; on a GPU 268 MB, rows enough to keep it busy
CHUNK_ELEMENTS = {"cpu": 1_280_000, "cuda": 2**26}
LEAST_ROWS, LEAST_ROWS_WIDE = 128, 320  # so that a large vocabulary's weights, which no cache holds, are read for enough of them; the second for D > THIN
LOG2_E = 1 / math.log(2)  # exp(x) = 2^(x LOG2_E)
THIN = 16  # up to this D the weights are laid out as [D, V] once a call: a CPU then multiplies by them up to four times as fast


def chunk_rows(device_type: str, vocab_size: int, n_embed: int) -> int:
    """C: the masked slots whose logits are in memory at a time."""
    least = LEAST_ROWS if n_embed <= THIN else LEAST_ROWS_WIDE
    return max(least, CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cpu"]) // vocab_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum of -log softmax(hidden @ weight.T + bias)[label], with the gradients computed in the forward pass.

    Logits exist for one chunk of slots at a time and are turned into their own gradient in place, so memory is O(C x V), and
    each logit passes through the cache once. The idea is that of Cut Your Losses (Wijmans et al. 2024, arXiv:2411.09009) and
    Liger Kernel (Hsu et al. 2024, arXiv:2410.10989). With a narrower dtype the matrices are multiplied in it, and everything else
    stays as it is.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, dtype: torch.dtype | None) -> Tensor:
        vocab_size, n_embed = weight.shape
        if n_embed <= THIN:
            weight = weight.T.contiguous().T
        chunk = min(chunk_rows(hidden.device.type, vocab_size, n_embed), len(labels))
        buffer = hidden.new_empty(chunk, vocab_size)
        is_narrow = dtype not in (None, hidden.dtype)
        if is_narrow:
            narrow_weight, narrow_buffer = weight.to(dtype), hidden.new_empty(chunk, vocab_size, dtype=dtype)
        bias_2, loss_2 = bias * LOG2_E, hidden.new_zeros(())
        hidden_grad, bias_grad = torch.empty_like(hidden), torch.zeros_like(bias)
        weight_grad = weight.new_zeros(n_embed, vocab_size)  # transposed: twice as fast for a narrow D, no slower for a wide one
        for start in range(0, len(labels), chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk, None]  # [C, D], [C, 1]
            used = (y != IGNORED).to(h.dtype)
            target = y.clamp_min(0)
            if is_narrow:
                narrow = torch.mm(h.to(dtype), narrow_weight.T, out=narrow_buffer[: len(h)])
                logits = torch.add(bias_2, narrow, alpha=LOG2_E, out=buffer[: len(h)])
            else:
                logits = torch.addmm(bias_2, h, weight.T, alpha=LOG2_E, out=buffer[: len(h)])  # [C, V], times LOG2_E
            logits -= logits.amax(dim=1, keepdim=True)
            target_logit = logits.gather(1, target)
            exponentials = logits.exp2_()
            total = exponentials.sum(dim=1, keepdim=True)
            loss_2 += ((total.log2() - target_logit) * used).sum()
            # d loss / d logits is (exponentials / total - one-hot) * used; the row factor is left to the narrow side
            row_factor = used / total
            logits_grad = exponentials.scatter_add_(1, target, -total)
            bias_grad.addmv_(logits_grad.T, row_factor[:, 0])
            if is_narrow:
                narrow.copy_(logits_grad)
                hidden_grad[start : start + chunk] = torch.mm(narrow, narrow_weight) * row_factor
                weight_grad += torch.mm((h * row_factor).to(dtype).T, narrow)
            else:
                hidden_grad[start : start + chunk] = torch.mm(logits_grad, weight) * row_factor
                weight_grad.addmm_((h * row_factor).T, logits_grad)
        ctx.save_for_backward(hidden_grad, weight_grad.T, bias_grad)
        return loss_2 / LOG2_E

    @staticmethod
    def backward(ctx, loss_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        return hidden_grad * loss_grad, weight_grad * loss_grad, bias_grad * loss_grad, None, None


def masked_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, n_masked: int, dtype: torch.dtype | None = None) -> Tensor:
    """The batch's share of the mean loss, in nats a masked token: shares of micro-batches and ranks add up.

    hidden: [N, D]. weight: [V, D]. bias: [V]. labels: int64 [N], IGNORED for empty slots. n_masked: the masked tokens of the
    whole global batch. dtype: in which matrices are multiplied; that of hidden when None.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, dtype) / max(1, n_masked)


@torch.no_grad()
def masked_scores(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[float, int]:
    """Summed loss in nats, and the number of tokens guessed right. Shapes as for masked_loss."""
    used = labels != IGNORED
    hidden, labels = hidden[used], labels[used]
    loss = correct = 0
    chunk = chunk_rows(hidden.device.type, *weight.shape)
    for h, y in zip(hidden.split(chunk), labels.split(chunk)):
        logits = torch.addmm(bias, h, weight.T)
        loss += torch.nn.functional.cross_entropy(logits, y, reduction="sum").double()
        correct += (logits.argmax(dim=1) == y).sum()
    return float(loss), int(correct)
