"""BERT (Devlin et al. 2019, arXiv:1810.04805): learned positions, post-norm, biases. arch = "bert".

Shapes: B sequences, T tokens, D = n_embed, Q = T, or the masked slots in the last layer.
"""

from torch import Tensor, nn

from microbert.kernels.gelu import gelu
from microbert.model import layers
from microbert.model.layers import Attention, Dropout, LayerNorm, MaskedLanguageModel, ModelConfig, at_positions

NORM_EPS = 1e-12
N_TOKEN_TYPES = 2  # BERT's two segments; pretraining on single texts uses the first


def new_norm(config: ModelConfig) -> LayerNorm:
    """Return a new layer norm of this architecture."""
    return LayerNorm(config.n_embed, eps=NORM_EPS)


class Embeddings(layers.Embeddings):
    """Embeddings of words, positions and token types."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.position = nn.Embedding(config.max_seq_len, config.n_embed)
        self.token_type = nn.Embedding(N_TOKEN_TYPES, config.n_embed)
        self.norm = new_norm(config)

    def forward(self, input_ids: Tensor, dropout_keys: Tensor | None) -> Tensor:
        x = self.word(input_ids)  # [B, T, D]
        x = x + (self.position.weight[: input_ids.shape[1]] + self.token_type.weight[0])
        return self.dropout(self.norm(x), dropout_keys)


class FeedForward(nn.Module):
    """Two matrices with GELU between them, and dropout."""

    def __init__(self, config: ModelConfig, site: int) -> None:
        super().__init__()
        self.expand = nn.Linear(config.n_embed, config.n_inner)
        self.contract = nn.Linear(config.n_inner, config.n_embed)
        self.dropout = Dropout(config, site)

    def forward(self, x: Tensor, dropout_keys: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """x: [B, Q, D]. dropout_keys, positions: as for Dropout. Returns [B, Q, D]."""
        return self.dropout(self.contract(gelu(self.expand(x))), dropout_keys, positions)


class Layer(nn.Module):
    """Post-norm: a norm follows each residual sum."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.attention = Attention(config, site=2 * number + 1, bias=True)
        self.attention_norm = new_norm(config)
        self.feed_forward = FeedForward(config, site=2 * number + 2)
        self.output_norm = new_norm(config)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, dropout_keys: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """x: [B, T, D]. Other arguments as for Attention. Returns [B, Q, D]."""
        x = self.attention_norm(self.attention(x, attention_mask, dropout_keys, positions) + at_positions(x, positions))
        return self.output_norm(x + self.feed_forward(x, dropout_keys, positions))


class Bert(MaskedLanguageModel):
    """Computes the same as `transformers.BertForMaskedLM` from the same weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.n_layers))
        self.head = layers.Head(config, nn.Identity(), new_norm(config), bias=True)
