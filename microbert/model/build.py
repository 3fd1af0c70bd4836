"""Build the model that a run's constants describe, before its first step."""

import dataclasses
import functools

import torch
from torch import Tensor, nn

from microbert.config.constants import ROTARY, ResolvedConfig
from microbert.config.terminal import counted
from microbert.data.row_lengths import most_positions
from microbert.data.shards import Tokens
from microbert.errors import InputError
from microbert.model.bert import Bert
from microbert.model.layers import MaskedLanguageModel, ModelConfig
from microbert.model.modern import ModernBert
from microbert.runtime.run import Run

INIT_STD = 0.02
ARCHITECTURES = {"bert": Bert, "modern": ModernBert}
POSITIONS = "embeddings.position.weight"  # the position weights of the others: one row for each position


def new_model(config: ModelConfig) -> MaskedLanguageModel:
    """Return a model of this shape with PyTorch's default weights."""
    return ARCHITECTURES[config.arch](config)


def build_model(config: ModelConfig, seed: int, token_counts: Tensor | None = None) -> MaskedLanguageModel:
    """Return a new model on the CPU: normal weights of standard deviation 0.02 drawn from the seed, zero biases.

    token_counts: [V], how often each token occurs in the training text. The output bias starts at the log-frequencies,
    so the loss starts at unigram entropy and no step is spent on learning which words are frequent.
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
            model.output_bias.copy_(log_frequencies(token_counts))
    return model


def log_frequencies(token_counts: Tensor) -> Tensor:
    """Return the logarithm of each token's share of a text, [V], as if each occurred half a time more.

    token_counts: [V].
    """
    return torch.log((token_counts + 0.5) / (token_counts + 0.5).sum())


def with_max_seq_len(model: MaskedLanguageModel, max_seq_len: int | None) -> MaskedLanguageModel:
    """Return the model for sequences of max_seq_len tokens, with the same weights; None leaves it unchanged.

    Raises InputError if the model has weights for fewer positions.
    """
    own = model.config.max_seq_len
    if max_seq_len in (None, own):
        return model
    weights = model.state_dict()
    if model.config.arch not in ROTARY:
        if max_seq_len > own:
            raise InputError(
                f"max_seq_len = {max_seq_len}, but this run has weights for {own} positions only. Use a smaller "
                'max_seq_len, or a run with arch = "modern" (the default of v4) for longer texts'
            )
        weights[POSITIONS] = weights[POSITIONS][:max_seq_len]
    other = new_model(dataclasses.replace(model.config, max_seq_len=max_seq_len))
    other.load_state_dict(weights)
    return other


@functools.cache
def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters, counting tied weights once, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in new_model(config).parameters())


def shape_of(config: ResolvedConfig, vocab_size: int) -> ModelConfig:
    """Return the shape of the run's model. vocab_size: of the trained tokenizer."""
    shape = vocab_size, config.n_layers, config.n_heads, config.n_embed, most_positions(config)
    return ModelConfig(*shape, config.dropout, config.arch)


def model_for_tokens(config: ResolvedConfig, tokens: Tokens) -> MaskedLanguageModel:
    """Return the new model of these constants and tokens, on the CPU."""
    counts = torch.from_numpy(tokens.token_counts)
    return build_model(shape_of(config, len(counts)), config.seed, counts)


def create_model(run: Run, tokens: Tokens, device: torch.device) -> MaskedLanguageModel:
    """Return the run's new model on the device, and print its size."""
    model = model_for_tokens(run.config, tokens)
    shape = model.config
    print(
        f"model: {counted(shape.n_layers, 'layer')}, {counted(shape.n_heads, 'head')}, "
        f"{shape.n_embed}-dim, {count_parameters(shape):,} parameters"
    )
    return model.to(device)


def unigram_entropy(token_counts: Tensor) -> float:
    """Return the loss, in nats per token, of guessing by frequency only. token_counts: [V]."""
    share = token_counts.double() / token_counts.sum()
    return float(-(share * torch.log(share.clamp_min(1e-300))).sum())
