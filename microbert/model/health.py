"""The size of a model's weights and attention logits, which grow without bound when a recipe is wrong.

Shapes: B sequences, T tokens, D = n_embed.
"""

import dataclasses

import torch
from torch import Tensor, nn

from microbert.model.layers import Attention, MaskedLanguageModel, StackedLinear

LOGIT_ROWS = 8  # sequences whose attention logits are in memory at a time


@dataclasses.dataclass(frozen=True)
class WeightsRms:
    """The root mean square of the word embeddings, and the smallest and largest of any matrix of a layer."""

    embeddings: float
    smallest: float
    largest: float


@torch.no_grad()
def weights_rms(model: MaskedLanguageModel) -> WeightsRms:
    """Return the root mean square of the weights. Query, key and value, which are stacked, count as three matrices."""
    matrices: list[Tensor] = []
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            matrices += module.weight.chunk(module.n_matrices if isinstance(module, StackedLinear) else 1)
    of_layers = torch.stack([_rms(matrix) for matrix in matrices])
    numbers = torch.stack([_rms(model.output_weight), of_layers.min(), of_layers.max()])  # one copy from the device
    return WeightsRms(*numbers.tolist())


def _rms(weights: Tensor) -> Tensor:
    return weights.square().mean().sqrt()


@torch.no_grad()
def largest_attention_logit(model: MaskedLanguageModel, input_ids: Tensor) -> float:
    """Return the largest |query . key| / sqrt(d), after rotary positions, of any layer, head and pair of tokens.

    input_ids: int64 [B, T], without padding, on the model's device.
    """
    found: list[Tensor] = []

    def record(attention: Attention, arguments: tuple[Tensor, ...]) -> None:
        found.append(attention.largest_logit(arguments[0]))

    attentions = [module for module in model.eval().modules() if isinstance(module, Attention)]
    hooks = [attention.register_forward_pre_hook(record) for attention in attentions]
    try:
        for part in input_ids.split(LOGIT_ROWS):
            model.hidden_states(part, None, None)
    finally:
        for hook in hooks:
            hook.remove()
    return float(torch.stack(found).max())
