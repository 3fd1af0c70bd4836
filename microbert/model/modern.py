"""A modern BERT after ModernBERT (Warner et al. 2024, arXiv:2412.13663): rotary positions, pre-norm, a gated
feed-forward, no biases except the output's. Every layer attends to the whole sequence. arch = "modern".

Shapes: B sequences, T tokens, D = n_embed, Q = T, or the masked slots in the last layer.
"""

from torch import Tensor, nn

from microbert.kernels.gelu import gelu
from microbert.model import layers
from microbert.model.layers import (
    Attention,
    Dropout,
    MaskedLanguageModel,
    ModelConfig,
    Rotary,
    StackedLinear,
    at_positions,
)

NORM_EPS = 1e-5


def new_norm(config: ModelConfig) -> nn.LayerNorm:
    """Return a new layer norm of this architecture."""
    return nn.LayerNorm(config.n_embed, eps=NORM_EPS, bias=False)


class Embeddings(layers.Embeddings):
    """Embeddings of words only: positions enter in the attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm = new_norm(config)

    def forward(self, input_ids: Tensor, dropout_keys: Tensor | None) -> Tensor:
        return self.dropout(self.norm(self.word(input_ids)), dropout_keys)  # [B, T, D]


class FeedForward(nn.Module):
    """A gated feed-forward (GeGLU: Shazeer 2020, arXiv:2002.05202), and dropout."""

    def __init__(self, config: ModelConfig, site: int) -> None:
        super().__init__()
        self.expand = StackedLinear(2, config.n_embed, config.n_inner, bias=False)
        self.contract = nn.Linear(config.n_inner, config.n_embed, bias=False)
        self.dropout = Dropout(config, site)

    def forward(self, x: Tensor, dropout_keys: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """x: [B, Q, D]. dropout_keys, positions: as for Dropout. Returns [B, Q, D]."""
        inner, gate = self.expand(x).chunk(2, dim=-1)
        return self.dropout(self.contract(gelu(inner) * gate), dropout_keys, positions)


class Layer(nn.Module):
    """Pre-norm: residual sums are not normalised, so that gradients reach the first layer unscaled."""

    def __init__(self, config: ModelConfig, number: int, rotary: Rotary) -> None:
        super().__init__()
        self.attention_norm = new_norm(config) if number else nn.Identity()  # the first layer's input is normalised
        self.attention = Attention(config, site=2 * number + 1, bias=False, rotary=rotary)
        self.feed_forward_norm = new_norm(config)
        self.feed_forward = FeedForward(config, site=2 * number + 2)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, dropout_keys: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """x: [B, T, D]. Other arguments as for Attention. Returns [B, Q, D]."""
        x = self.attention(self.attention_norm(x), attention_mask, dropout_keys, positions) + at_positions(x, positions)
        return x + self.feed_forward(self.feed_forward_norm(x), dropout_keys, positions)


class ModernBert(MaskedLanguageModel):
    """Computes the same as `transformers.ModernBertForMaskedLM` from the same weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        rotary = Rotary(config)  # one table for all layers
        self.layers = nn.ModuleList(Layer(config, number, rotary) for number in range(config.n_layers))
        self.head = layers.Head(config, new_norm(config), new_norm(config), bias=False)
