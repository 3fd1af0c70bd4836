"""The model that the constants describe, as it is before the first step."""

import dataclasses
import functools

import torch
from torch import Tensor, nn

from microbert.config.constants import Config
from microbert.data.shards import Tokens
from microbert.errors import InputError
from microbert.model.bert import Bert
from microbert.model.layers import MaskedLanguageModel, ModelConfig
from microbert.model.modern import ModernBert

INIT_STD = 0.02
ARCHITECTURES = {"bert": Bert, "modern": ModernBert}
ROTARY = {"modern"}  # those whose positions have no weights
POSITIONS = "embeddings.position.weight"  # those of the others, a row each


def new_model(config: ModelConfig) -> MaskedLanguageModel:
    """With whatever weights torch gives it."""
    return ARCHITECTURES[config.arch](config)


def build_model(config: ModelConfig, seed: int, token_counts: Tensor | None = None) -> MaskedLanguageModel:
    """A new model, a function of (config, seed): normal weights of standard deviation 0.02, zero biases, on the CPU.

    token_counts: [V], how often each token stands in the training text. The output bias starts at its log-frequency, so the
    first step stands at unigram entropy and no step is spent on learning which words are frequent.
    """
    generator = torch.Generator().manual_seed(seed)
    model = new_model(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, INIT_STD, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        if token_counts is not None:
            model.output_bias.copy_(torch.log((token_counts + 0.5) / (token_counts + 0.5).sum()))
    return model


def with_max_seq_len(model: MaskedLanguageModel, max_seq_len: int | None) -> MaskedLanguageModel:
    """The same weights for sequences of so many tokens; None leaves the model as it is. Raises InputError where its positions have weights, and fewer of them."""
    own = model.config.max_seq_len
    if max_seq_len in (None, own):
        return model
    weights = model.state_dict()
    if model.config.arch not in ROTARY:
        if max_seq_len > own:
            raise InputError(
                f'max_seq_len = {max_seq_len}: this run has weights for {own} positions, and reads no more; longer texts need arch = "modern", as v4 has it'
            )
        weights[POSITIONS] = weights[POSITIONS][:max_seq_len]
    other = new_model(dataclasses.replace(model.config, max_seq_len=max_seq_len))
    other.load_state_dict(weights)
    return other


@functools.cache
def count_parameters(config: ModelConfig) -> int:
    """Of the model with its tied output weights, without taking memory for it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in new_model(config).parameters())


def shape_of(config: Config, vocab_size: int) -> ModelConfig:
    """The model's shape by the constants, with the vocabulary that the corpus gave."""
    return ModelConfig(
        vocab_size, config.n_layers, config.n_heads, config.n_embed, config.max_seq_len, config.dropout, config.arch
    )


def model_for_tokens(config: Config, tokens: Tokens) -> MaskedLanguageModel:
    """The new model that the constants describe."""
    counts = torch.from_numpy(tokens.token_counts)
    model = build_model(shape_of(config, len(counts)), config.seed, counts)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {config.n_layers} layers, {config.n_heads} heads, {config.n_embed}-dim, {n_parameters:,} parameters")
    return model


def unigram_entropy(token_counts: Tensor) -> float:
    """The loss, in nats a token, of guessing by frequency alone. token_counts: [V]."""
    share = token_counts.double() / token_counts.sum()
    return float(-(share * torch.log(share.clamp_min(1e-300))).sum())
