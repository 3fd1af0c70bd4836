"""A modern BERT, as ModernBERT has it (Warner et al. 2024, arXiv:2412.13663): rotary positions, norms before each part, a gated
feed-forward, no biases but that of the output. Every layer attends to the whole sequence. arch = "modern".

Shapes: B sequences, T tokens, D = n_embed, N rows, Q = T, or the masked slots in the last layer.
"""

import torch
from torch import Tensor, nn

from microbert.kernels.gelu import gelu
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
    return nn.LayerNorm(config.n_embed, eps=NORM_EPS, bias=False)


class Embeddings(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.n_embed)
        self.norm = new_norm(config)
        self.dropout = Dropout(config, site=0)

    def forward(self, input_ids: Tensor, dropout_keys: Tensor | None) -> Tensor:
        return self.dropout(self.norm(self.word(input_ids)), dropout_keys)  # [B, T, D]


class Layer(nn.Module):
    """Pre-norm: the sums are never normalised on the way, which lets gradients through to the first layer."""

    def __init__(self, config: ModelConfig, number: int, rotary: Rotary) -> None:
        super().__init__()
        self.attention_norm = new_norm(config) if number else nn.Identity()  # the first layer's input comes from a norm
        self.attention = Attention(config, bias=False, rotary=rotary)
        self.feed_forward_norm = new_norm(config)
        self.expand = StackedLinear(2, config.n_embed, config.n_inner, bias=False)
        self.contract = nn.Linear(config.n_inner, config.n_embed, bias=False)
        self.attention_dropout, self.output_dropout = (Dropout(config, site=2 * number + place) for place in (1, 2))

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, dropout_keys: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        attended = self.attention_dropout(
            self.attention(self.attention_norm(x), attention_mask, positions), dropout_keys, positions
        )
        x = at_positions(x, positions) + attended  # [B, Q, D]
        inner, gate = self.expand(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.output_dropout(self.contract(gelu(inner) * gate), dropout_keys, positions)


class Head(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_norm = new_norm(config)  # of the encoder's last sum
        self.transform = nn.Linear(config.n_embed, config.n_embed, bias=False)
        self.norm = new_norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, D]. Returns [N, D]."""
        return self.after_norm(self.input_norm(x))

    def after_norm(self, x: Tensor) -> Tensor:
        """The same for what has been through `input_norm`: what transformers calls the head."""
        return self.norm(gelu(self.transform(x)))


class ModernBert(MaskedLanguageModel):
    """Computes what `transformers.ModernBertForMaskedLM` computes from the same weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        rotary = Rotary(config)  # one table for all layers
        self.layers = nn.ModuleList(Layer(config, number, rotary) for number in range(config.n_layers))
        self.head = Head(config)
