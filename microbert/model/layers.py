"""Modules of both architectures: embeddings, attention, dropout, rotary positions, the head and the base of the models.

Only masked positions reach the vocabulary. So the last layer computes keys and values of every token, but queries,
attention and feed-forward of the masked positions only.
Shapes: B sequences, T tokens, D = n_embed, H heads of d = D / H numbers, M masked slots per sequence, V vocabulary;
Q is T, or M in the last layer.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microbert.kernels.attention import attend
from microbert.kernels.gelu import gelu
from microbert.kernels.norm import layer_norm
from microbert.runtime.counter_rng import RANDOM_BITS, uniform_bits

ROTARY_BASE = 10_000.0  # of RoFormer (Su et al. 2021, arXiv:2104.09864)
TABLE_NUMBERS = 2**20  # numbers of each rotary table built in advance: 65,536 positions of v4's heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. arch: "bert" or "modern"."""

    vocab_size: int
    n_layers: int
    n_heads: int
    n_embed: int
    max_seq_len: int
    dropout: float = 0.0
    arch: str = "bert"

    @property
    def n_inner(self) -> int:
        """The inner width of the feed-forward: 4 D, or about 8/3 D if gated, with three matrices instead of two."""
        return 4 * self.n_embed if self.arch == "bert" else -(-8 * self.n_embed // 3 // 8) * 8


class LayerNorm(nn.LayerNorm):
    """Layer norm of rows [..., D], with weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class StackedLinear(nn.Linear):
    """Several matrices of one shape, stacked so that one product computes all of them."""

    def __init__(self, n_matrices: int, n_in: int, n_out: int, bias: bool) -> None:
        super().__init__(n_in, n_matrices * n_out, bias)
        self.n_matrices = n_matrices


class Dropout(nn.Module):
    """Dropout computed from a random key of each sequence.

    A sequence drops the same values in any micro-batch and on any process. `site` numbers the places of dropout in the
    model, so that each has its own random numbers.
    """

    def __init__(self, config: ModelConfig, site: int) -> None:
        super().__init__()
        self.share, self.start = config.dropout, site * config.max_seq_len * config.n_embed

    def forward(self, x: Tensor, keys: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """x: [B, Q, D]. keys: int64 [B], random; None disables dropout. positions: int64 [B, M] of the rows of x; None
        for all tokens."""
        if keys is None or not self.share:
            return x
        D = x.shape[2]
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        counter = self.start + positions[:, :, None] * D + torch.arange(D, device=x.device)  # [B or 1, Q, D]
        is_dropped = uniform_bits(keys[:, None, None] + counter) < int(self.share * 2**RANDOM_BITS)
        return x.masked_fill(is_dropped, 0.0) / (1 - self.share)


def at_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """Return the rows of x: [B, T, D] at the positions: int64 [B, M], as [B, M, D]; x itself for None."""
    if positions is None:
        return x
    B, T, D = x.shape
    rows = positions + T * torch.arange(B, device=positions.device)[:, None]
    return x.reshape(B * T, D).index_select(0, rows.reshape(-1)).view(B, -1, D)


class Rotary(nn.Module):
    """Rotary positions (RoFormer): rotate queries and keys so that their product depends on the distance.

    Number i of a head is paired with number i + d/2, as in transformers. Long tables, for a max_seq_len far above any
    training run, are built only for the positions in use.
    """

    cos: Tensor  # [at most T, d]
    sin: Tensor  # the same, with the sign of the rotated half

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._head_size = config.n_embed // config.n_heads
        cos, sin = self._tables(min(config.max_seq_len, max(1, TABLE_NUMBERS // self._head_size)))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _tables(self, n_positions: int) -> tuple[Tensor, Tensor]:
        half = self._head_size // 2
        frequencies = ROTARY_BASE ** -(torch.arange(half) / half)
        angles = torch.arange(n_positions)[:, None] * frequencies  # [T, d/2]
        return angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)

    def reserve(self, n_positions: int) -> None:
        """Extend the tables to at least n_positions."""
        if n_positions > len(self.cos):
            self.cos, self.sin = (table.to(self.cos.device) for table in self._tables(n_positions))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x: [B, Q, H, d]. positions: int64 [B, M] of the rows of x, or None for all tokens. Call `reserve` before."""
        cos, sin = (
            table[None, : x.shape[1]] if positions is None else table[positions] for table in (self.cos, self.sin)
        )  # [B or 1, Q, d]
        return x * cos[:, :, None] + x.roll(x.shape[-1] // 2, dims=-1) * sin[:, :, None]


class Attention(nn.Module):
    """Bidirectional self-attention, with dropout on its output: on the probabilities it would be slow on any device."""

    def __init__(self, config: ModelConfig, site: int, bias: bool, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.query_key_value = StackedLinear(3, config.n_embed, config.n_embed, bias)
        self.output = nn.Linear(config.n_embed, config.n_embed, bias)
        self.rotary = rotary
        self.dropout = Dropout(config, site)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, dropout_keys: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """x: [B, T, D]. attention_mask: bool [B, 1, 1, T]. dropout_keys: as for Dropout. positions: int64 [B, M]; None
        for all. Returns [B, Q, D]."""
        if positions is None:
            query, key, value = self._products(x, 0, 3)
        else:
            (query,), (key, value) = self._products(at_positions(x, positions), 0, 1), self._products(x, 1, 3)
        if self.rotary is not None:
            self.rotary.reserve(x.shape[1])
            query, key = self.rotary(query, positions), self.rotary(key)
        x = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attention_mask)  # [B, H, Q, d]
        return self.dropout(self.output(x.transpose(1, 2).flatten(2)), dropout_keys, positions)

    def largest_logit(self, x: Tensor) -> Tensor:
        """Return the largest |query . key| / sqrt(d) of all pairs of tokens, in any head and sequence: [].

        x: [B, T, D], without padding. Memory: one number for each pair.
        """
        query, key = self._products(x, 0, 2)
        if self.rotary is not None:
            self.rotary.reserve(x.shape[1])
            query, key = self.rotary(query), self.rotary(key)
        logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)  # [B, H, T, T]
        return logits.abs().amax() / math.sqrt(query.shape[-1])

    def _products(self, x: Tensor, first: int, last: int) -> list[Tensor]:
        """Return the products with the matrices `first` to `last` - 1 of query, key, value: each [B, Q, H, d].

        Splitting before reshaping into heads is four times as fast as one permutation.
        """
        B, Q, D = x.shape
        rows, bias = slice(first * D, last * D), self.query_key_value.bias
        products = F.linear(x, self.query_key_value.weight[rows], None if bias is None else bias[rows])
        return [product.view(B, Q, self.n_heads, -1) for product in products.split(D, dim=2)]


class Embeddings(nn.Module):
    """Base of an architecture's embeddings. forward(input_ids, dropout_keys) -> [B, T, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.n_embed)
        self.dropout = Dropout(config, site=0)


class Head(nn.Module):
    """The layers between the encoder and the vocabulary, with the bias of the output."""

    def __init__(self, config: ModelConfig, input_norm: nn.Module, norm: nn.Module, bias: bool) -> None:
        super().__init__()
        self.input_norm = input_norm
        self.transform = nn.Linear(config.n_embed, config.n_embed, bias)
        self.norm = norm
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, D]. Returns [N, D]."""
        return self.after_norm(self.input_norm(x))

    def after_norm(self, x: Tensor) -> Tensor:
        """Return the head of an x that has passed `input_norm`: the part that transformers calls the head."""
        return self.norm(gelu(self.transform(x)))


class MaskedLanguageModel(nn.Module):
    """An encoder and its head. Each architecture defines its parts.

    A layer is called as layer(x, attention_mask, dropout_keys, positions) -> [B, Q, D].
    """

    embeddings: Embeddings
    layers: nn.ModuleList
    head: Head

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

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
        """Return the output of the head at the given positions: [B * M, D].

        input_ids: int64 [B, T]. attention_mask: bool [B, T], True for real tokens; None without padding. positions:
        int64 [B, M]. dropout_keys: int64 [B], a random number for each sequence; None disables dropout. Logits are the
        output times `output_weight` plus `output_bias`.
        """
        return self.head(self.hidden_states(input_ids, attention_mask, positions, dropout_keys).flatten(0, 1))

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Return the output of the last layer: [B, Q, D]. Arguments as for forward; positions None for all tokens."""
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :]  # the same for all heads and queries
        x = self.embeddings(input_ids, dropout_keys)
        for layer in self.layers[:-1]:
            x = layer(x, attention_mask, dropout_keys)
        return self.layers[-1](x, attention_mask, dropout_keys, positions)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Return the logits: [B * M, V]. Arguments as for forward."""
        return F.linear(self(input_ids, attention_mask, positions), self.output_weight, self.output_bias)
