"""The BERT encoder and its MLM head (Devlin et al. 2019, arXiv:1810.04805), with logits at masked positions only.

Shapes: B sequences, T tokens, D = n_embed, H heads, M masked slots a sequence, V vocabulary.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Config
from .counter_rng import RANDOM_BITS, uniform_bits
from .tokens import Tokens

LAYER_NORM_EPS = 1e-12
N_TOKEN_TYPES = 2  # BERT's two segments; pretraining on single texts uses the first
INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    n_layers: int
    n_heads: int
    n_embed: int
    max_seq_len: int
    dropout: float = 0.0

    @property
    def n_inner(self) -> int:
        return 4 * self.n_embed


class Dropout(nn.Module):
    """Sets a share of the values to 0 and scales up the rest, by arithmetic on a key of each sequence.

    So a sequence drops the same values in whatever micro-batch and on whatever process it is computed. `site` tells the places of the model apart.
    """

    def __init__(self, share: float, site: int) -> None:
        super().__init__()
        self.share, self.site = share, site

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x: [B, T, D]. keys: int64 [B], random; None drops nothing."""
        if keys is None or not self.share:
            return x
        B, T, D = x.shape
        counter = torch.arange(T * D, device=x.device) + self.site * T * D
        is_dropped = uniform_bits(keys[:, None] + counter) < int(self.share * 2**RANDOM_BITS)  # [B, T * D]
        return x.masked_fill(is_dropped.view(B, T, D), 0.0) / (1 - self.share)


class Embeddings(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.n_embed)
        self.position = nn.Embedding(config.max_seq_len, config.n_embed)
        self.token_type = nn.Embedding(N_TOKEN_TYPES, config.n_embed)
        self.norm = nn.LayerNorm(config.n_embed, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(config.dropout, site=0)

    def forward(self, input_ids: Tensor, dropout_keys: Tensor | None) -> Tensor:
        x = self.word(input_ids)  # [B, T, D]
        x = x + (self.position.weight[: input_ids.shape[1]] + self.token_type.weight[0])
        return self.dropout(self.norm(x), dropout_keys)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.query_key_value = nn.Linear(config.n_embed, 3 * config.n_embed)
        self.output = nn.Linear(config.n_embed, config.n_embed)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        B, T, D = x.shape
        query, key, value = self.query_key_value(x).view(B, T, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)  # [B, H, T, D/H]
        # no dropout on the attention probabilities: it would take the slow path on every device
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return self.output(x.transpose(1, 2).reshape(B, T, D))


class Layer(nn.Module):
    """Post-norm, as in BERT: the norm comes after each residual sum."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.n_embed, eps=LAYER_NORM_EPS)
        self.expand = nn.Linear(config.n_embed, config.n_inner)
        self.contract = nn.Linear(config.n_inner, config.n_embed)
        self.output_norm = nn.LayerNorm(config.n_embed, eps=LAYER_NORM_EPS)
        self.attention_dropout, self.output_dropout = (Dropout(config.dropout, site=2 * number + place) for place in (1, 2))

    def forward(self, x: Tensor, attention_mask: Tensor | None, dropout_keys: Tensor | None) -> Tensor:
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, attention_mask), dropout_keys))
        return self.output_norm(x + self.output_dropout(self.contract(F.gelu(self.expand(x))), dropout_keys))


class Head(nn.Module):
    """The MLM head up to the vocabulary; its output weights are the word embeddings (tied)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.n_embed, config.n_embed)
        self.norm = nn.LayerNorm(config.n_embed, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.transform(x)))


class Bert(nn.Module):
    """BERT for masked language modelling. Computes what `transformers.BertForMaskedLM` computes from the same weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.n_layers))
        self.head = Head(config)

    @property
    def output_weight(self) -> Tensor:
        """[V, D]"""
        return self.embeddings.word.weight

    @property
    def output_bias(self) -> Tensor:
        """[V]"""
        return self.head.bias

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """What the head hands to the vocabulary at the given positions.

        input_ids: int64 [B, T]. attention_mask: bool [B, T], True for real tokens; None when there is no padding.
        positions: int64 [B, M]. dropout_keys: int64 [B], a random number for each sequence; None where nothing is to be dropped.
        Returns [B * M, D]; times `output_weight` plus `output_bias` are the logits.
        """
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :]  # the same for all heads and queries
        x = self.embeddings(input_ids, dropout_keys)
        for layer in self.layers:
            x = layer(x, attention_mask, dropout_keys)
        B, T, D = x.shape
        rows = (positions + T * torch.arange(B, device=positions.device)[:, None]).reshape(-1)
        return self.head(x.reshape(B * T, D).index_select(0, rows))

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Arguments as for forward; returns [B * M, V]."""
        return F.linear(self(input_ids, attention_mask, positions), self.output_weight, self.output_bias)


def build_model(config: ModelConfig, seed: int, token_counts: Tensor | None = None) -> Bert:
    """A new model, a function of (config, seed): normal weights of standard deviation 0.02, zero biases, on the CPU.

    token_counts: [V], how often each token stands in the training text. The output bias starts at its log-frequency, so the
    first step stands at unigram entropy and no step is spent on learning which words are frequent.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Bert(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, INIT_STD, generator=generator)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        if token_counts is not None:
            model.head.bias.copy_(torch.log((token_counts + 0.5) / (token_counts + 0.5).sum()))
    return model


def model_for_tokens(config: Config, tokens: Tokens) -> Bert:
    """The new model that the constants describe, with the vocabulary that the corpus gave."""
    counts = torch.from_numpy(tokens.token_counts)
    model_config = ModelConfig(vocab_size=len(counts), n_layers=config.n_layers, n_heads=config.n_heads, n_embed=config.n_embed,
                               max_seq_len=config.max_seq_len, dropout=config.dropout)
    model = build_model(model_config, config.seed, counts)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {config.n_layers} layers, {config.n_heads} heads, {config.n_embed}-dim, {n_parameters:,} parameters")
    return model


def unigram_entropy(token_counts: Tensor) -> float:
    """The loss, in nats a token, of guessing by frequency alone. token_counts: [V]."""
    share = token_counts.double() / token_counts.sum()
    return float(-(share * torch.log(share.clamp_min(1e-300))).sum())
