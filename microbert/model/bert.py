"""BERT (Devlin et al. 2019, arXiv:1810.04805): learned positions, norms behind each sum, biases. arch = "bert".

Shapes: B sequences, T tokens, D = n_embed, N rows, Q = T, or the masked slots in the last layer.
"""

import torch
from torch import Tensor, nn

from microbert.kernels.gelu import gelu
from microbert.model.layers import Attention, Dropout, LayerNorm, MaskedLanguageModel, ModelConfig, at_positions

NORM_EPS = 1e-12
N_TOKEN_TYPES = 2  # BERT's two segments; pretraining on single texts uses the first


class Embeddings(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.n_embed)
        self.position = nn.Embedding(config.max_seq_len, config.n_embed)
        self.token_type = nn.Embedding(N_TOKEN_TYPES, config.n_embed)
        self.norm = LayerNorm(config.n_embed, eps=NORM_EPS)
        self.dropout = Dropout(config, site=0)

    def forward(self, input_ids: Tensor, dropout_keys: Tensor | None) -> Tensor:
        x = self.word(input_ids)  # [B, T, D]
        x = x + (self.position.weight[: input_ids.shape[1]] + self.token_type.weight[0])
        return self.dropout(self.norm(x), dropout_keys)


class Layer(nn.Module):
    """Post-norm: the norm comes after each residual sum."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.attention = Attention(config, bias=True)
        self.attention_norm = LayerNorm(config.n_embed, eps=NORM_EPS)
        self.expand = nn.Linear(config.n_embed, config.n_inner)
        self.contract = nn.Linear(config.n_inner, config.n_embed)
        self.output_norm = LayerNorm(config.n_embed, eps=NORM_EPS)
        self.attention_dropout, self.output_dropout = (Dropout(config, site=2 * number + place) for place in (1, 2))

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, dropout_keys: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        attended = self.attention_dropout(self.attention(x, attention_mask, positions), dropout_keys, positions)
        x = self.attention_norm(at_positions(x, positions) + attended)  # [B, Q, D]
        return self.output_norm(x + self.output_dropout(self.contract(gelu(self.expand(x))), dropout_keys, positions))


class Head(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.n_embed, config.n_embed)
        self.norm = LayerNorm(config.n_embed, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, D]. Returns [N, D]."""
        return self.norm(gelu(self.transform(x)))


class Bert(MaskedLanguageModel):
    """Computes what `transformers.BertForMaskedLM` computes from the same weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.n_layers))
        self.head = Head(config)
