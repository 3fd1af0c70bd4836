"""What both architectures are made of: the shape, attention, the gathering of masked positions, dropout.

Only the masked positions reach the vocabulary, so the last layer computes nothing else: keys and values of every token, and queries, attention
and feed-forward of the masked positions alone.
Shapes: B sequences, T tokens, D = n_embed, H heads, M masked slots a sequence, V vocabulary; Q is T, or M in the last layer.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microbert.kernels.attention import attend
from microbert.kernels.norm import layer_norm
from microbert.runtime.counter_rng import RANDOM_BITS, uniform_bits

ROTARY_BASE = 10_000.0  # of RoFormer (Su et al. 2021, arXiv:2104.09864)
TABLE_NUMBERS = 2**20  # of each rotary table that is built at once: 65,536 positions of v4's heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """arch: "bert" or "modern"."""

    vocab_size: int
    n_layers: int
    n_heads: int
    n_embed: int
    max_seq_len: int
    dropout: float = 0.0
    arch: str = "bert"

    @property
    def n_inner(self) -> int:
        """The width between the two matrices of a feed-forward. A gated one has three, so that it takes as many numbers at two thirds of it."""
        return 4 * self.n_embed if self.arch == "bert" else -(-8 * self.n_embed // 3 // 8) * 8


class LayerNorm(nn.LayerNorm):
    """Of rows [..., D], with weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class StackedLinear(nn.Linear):
    """Several matrices of one shape over each other, so that one product does for all of them."""

    def __init__(self, n_matrices: int, n_in: int, n_out: int, bias: bool) -> None:
        super().__init__(n_in, n_matrices * n_out, bias)
        self.n_matrices = n_matrices


class Dropout(nn.Module):
    """Sets a share of the values to 0 and scales up the rest, by arithmetic on a key of each sequence.

    So a sequence drops the same values in whatever micro-batch and on whatever process it is computed. `site` tells the places of the model apart.
    """

    def __init__(self, config: ModelConfig, site: int) -> None:
        super().__init__()
        self.share, self.start = config.dropout, site * config.max_seq_len * config.n_embed

    def forward(self, x: Tensor, keys: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """x: [B, Q, D]. keys: int64 [B], random; None drops nothing. positions: int64 [B, M], of the rows of x; None where these are all tokens."""
        if keys is None or not self.share:
            return x
        D = x.shape[2]
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        counter = self.start + positions[:, :, None] * D + torch.arange(D, device=x.device)  # [B or 1, Q, D]
        is_dropped = uniform_bits(keys[:, None, None] + counter) < int(self.share * 2**RANDOM_BITS)
        return x.masked_fill(is_dropped, 0.0) / (1 - self.share)


def at_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """x: [B, T, D]. positions: int64 [B, M], or None for all. Returns the rows at the positions: [B, M, D]."""
    if positions is None:
        return x
    B, T, D = x.shape
    rows = positions + T * torch.arange(B, device=positions.device)[:, None]
    return x.reshape(B * T, D).index_select(0, rows.reshape(-1)).view(B, -1, D)


class Rotary(nn.Module):
    """Turns queries and keys by angles that grow with the position, so that their product depends on the distance (RoFormer).

    Halves are paired, as transformers does it: number i of a head with number i + d/2.
    The tables of a max_seq_len far above any training run are built only for the positions that a text has.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._head_size = config.n_embed // config.n_heads
        cos, sin = self._tables(min(config.max_seq_len, max(1, TABLE_NUMBERS // self._head_size)))
        self.register_buffer("cos", cos, persistent=False)  # [at most T, d]
        self.register_buffer("sin", sin, persistent=False)  # with the sign of the turned half

    def _tables(self, n_positions: int) -> tuple[Tensor, Tensor]:
        half = self._head_size // 2
        frequencies = ROTARY_BASE ** -(torch.arange(half) / half)
        angles = torch.arange(n_positions)[:, None] * frequencies  # [T, d/2]
        return angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)

    def reserve(self, n_positions: int) -> None:
        """Extend the tables to at least so many positions."""
        if n_positions > len(self.cos):
            self.cos, self.sin = (table.to(self.cos.device) for table in self._tables(n_positions))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x: [B, Q, H, d], of all tokens, or of those at the positions: int64 [B, M]. `reserve` has been called for
        them."""
        cos, sin = (
            table[None, : x.shape[1]] if positions is None else table[positions] for table in (self.cos, self.sin)
        )  # [B or 1, Q, d]
        return x * cos[:, :, None] + x.roll(x.shape[-1] // 2, dims=-1) * sin[:, :, None]


class Attention(nn.Module):
    """Every token with every other of its sequence. There is no dropout on the probabilities: it would take the slow path on every device."""

    def __init__(self, config: ModelConfig, bias: bool, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.query_key_value = StackedLinear(3, config.n_embed, config.n_embed, bias)
        self.output = nn.Linear(config.n_embed, config.n_embed, bias)
        self.rotary = rotary

    def forward(self, x: Tensor, attention_mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """x: [B, T, D]. attention_mask: bool [B, 1, 1, T]. positions: int64 [B, M], or None for all. Returns [B, Q, D]."""
        if positions is None:
            query, key, value = self._products(x, 0, 3)
        else:
            (query,), (key, value) = self._products(at_positions(x, positions), 0, 1), self._products(x, 1, 3)
        if self.rotary is not None:
            self.rotary.reserve(x.shape[1])
            query, key = self.rotary(query, positions), self.rotary(key)
        x = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attention_mask)  # [B, H, Q, d]
        return self.output(x.transpose(1, 2).flatten(2))

    def _products(self, x: Tensor, first: int, last: int) -> list[Tensor]:
        """With those of the three matrices: each [B, Q, H, d]. Parted before they are turned into heads: four times as fast as one permutation."""
        B, Q, D = x.shape
        rows, bias = slice(first * D, last * D), self.query_key_value.bias
        products = F.linear(x, self.query_key_value.weight[rows], None if bias is None else bias[rows])
        return [product.view(B, Q, self.n_heads, -1) for product in products.split(D, dim=2)]


class MaskedLanguageModel(nn.Module):
    """An encoder and its head. An architecture gives it `embeddings`, `layers` and `head`, with the bias of the output in `head.bias`.

    embeddings(input_ids, dropout_keys) -> [B, T, D]; layer(x, attention_mask, dropout_keys, positions) -> [B, Q, D]; head(x) -> [B * M, D].
    """

    config: ModelConfig
    embeddings: nn.Module
    layers: nn.ModuleList
    head: nn.Module

    @property
    def output_weight(self) -> Tensor:
        """[V, D]: the word embeddings (tied)."""
        return self.embeddings.word.weight

    @property
    def output_bias(self) -> Tensor:
        """[V]"""
        return self.head.bias

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor, dropout_keys: Tensor | None = None
    ) -> Tensor:
        """What the head hands to the vocabulary at the given positions.

        input_ids: int64 [B, T]. attention_mask: bool [B, T], True for real tokens; None when there is no padding.
        positions: int64 [B, M]. dropout_keys: int64 [B], a random number for each sequence; None where nothing is to be dropped.
        Returns [B * M, D]; times `output_weight` plus `output_bias` are the logits.
        """
        return self.head(self.hidden_states(input_ids, attention_mask, positions, dropout_keys).flatten(0, 1))

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """What the last layer gives at the positions, or for all tokens where these are None: [B, Q, D]. Else as for forward."""
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :]  # the same for all heads and queries
        x = self.embeddings(input_ids, dropout_keys)
        for layer in self.layers[:-1]:
            x = layer(x, attention_mask, dropout_keys)
        return self.layers[-1](x, attention_mask, dropout_keys, positions)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Arguments as for forward; returns [B * M, V]."""
        return F.linear(self(input_ids, attention_mask, positions), self.output_weight, self.output_bias)
