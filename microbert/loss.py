"""Cross-entropy over masked positions, normalised by the global count of masked tokens.

Shapes: N masked slots of a batch, D = n_embed, V vocabulary, C slots a chunk.
"""

import torch
from torch import Tensor

from .masking import IGNORED

CHUNK_ELEMENTS = 1_280_000  # logits in memory at a time: 5 MB in fp32, which a CPU's caches hold


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum of -log softmax(hidden @ weight.T + bias)[label], with the gradients computed in the forward pass.

    Logits exist for one chunk of slots at a time and are turned into their own gradient in place, so memory is O(C x V), and
    each logit passes through the cache once. The idea is that of Cut Your Losses (Wijmans et al. 2024, arXiv:2411.09009) and
    Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        n_embed, vocab_size = weight.shape[1], weight.shape[0]
        chunk = max(1, CHUNK_ELEMENTS // vocab_size)
        buffer = hidden.new_empty(chunk, vocab_size)
        loss = hidden.new_zeros(())
        hidden_grad, bias_grad = torch.empty_like(hidden), torch.zeros_like(bias)
        weight_grad = weight.new_zeros(n_embed, vocab_size)  # transposed: twice as fast for a narrow D, no slower for a wide one
        for start in range(0, len(labels), chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk, None]  # [C, D], [C, 1]
            used = (y != IGNORED).to(h.dtype)
            target = y.clamp_min(0)
            logits = torch.addmm(bias, h, weight.T, out=buffer[: len(h)])  # [C, V]
            logits -= logits.amax(dim=1, keepdim=True)
            target_logit = logits.gather(1, target)
            exponentials = logits.exp_()
            total = exponentials.sum(dim=1, keepdim=True)
            loss += ((total.log() - target_logit) * used).sum()
            # d loss / d logits is (exponentials / total - one-hot) * used; the row factor is left to the narrow side
            row_factor = used / total
            logits_grad = exponentials.scatter_add_(1, target, -total)
            hidden_grad[start : start + chunk] = torch.mm(logits_grad, weight) * row_factor
            weight_grad.addmm_((h * row_factor).T, logits_grad)
            bias_grad.addmv_(logits_grad.T, row_factor[:, 0])
        ctx.save_for_backward(hidden_grad, weight_grad.T, bias_grad)
        return loss

    @staticmethod
    def backward(ctx, loss_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        return hidden_grad * loss_grad, weight_grad * loss_grad, bias_grad * loss_grad, None


def masked_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, n_masked: int) -> Tensor:
    """The batch's share of the mean loss, in nats a masked token: shares of micro-batches and ranks add up.

    hidden: [N, D]. weight: [V, D]. bias: [V]. labels: int64 [N], IGNORED for empty slots. n_masked: the masked tokens of the
    whole global batch.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels) / max(1, n_masked)


@torch.no_grad()
def masked_scores(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[float, int]:
    """Summed loss in nats, and the number of tokens guessed right. Shapes as for masked_loss."""
    used = labels != IGNORED
    hidden, labels = hidden[used], labels[used]
    loss = correct = 0
    chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
    for h, y in zip(hidden.split(chunk), labels.split(chunk)):
        logits = torch.addmm(bias, h, weight.T)
        loss += torch.nn.functional.cross_entropy(logits, y, reduction="sum").double()
        correct += (logits.argmax(dim=1) == y).sum()
    return float(loss), int(correct)
