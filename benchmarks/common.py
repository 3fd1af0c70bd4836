"""What several benchmarks share: configurations, prepared text, training steps, held-out loss, tables."""

import os
import statistics
from collections.abc import Sequence

import torch
from checkout import ROOT
from tokenizers import Tokenizer

from microbert.config.constants import Config, fill_in, resolve_batch_size
from microbert.config.flags import read_script
from microbert.data.batches import evaluation_batches, random_batch
from microbert.data.masking import EVALUATION_PROBABILITY, MaskedBatch, mask_batch
from microbert.data.prepare import prepare_quietly
from microbert.data.shards import Tokens
from microbert.data.training_rows import TrainingRows
from microbert.model.build import model_for_tokens
from microbert.model.layers import MaskedLanguageModel
from microbert.model.loss import masked_scores
from microbert.model.word_vectors import start_from_neighbours
from microbert.runtime.distributed import World
from microbert.train.step import Learner

# v4 on a CPU, at a fixed size
SMALL_V4 = ("--vocab-size", "10000", "--n-layers", "4", "--batch-size", "32", "--device", "cpu")


def script_config(name: str, flags: Sequence[str] = (), tier: dict[str, int] | None = None) -> Config:
    """Return the Config of a script, such as "v1", in one process. tier: values for what its preset leaves open."""
    config = read_script(ROOT / f"mlm_pretrain_{name}.py", flags)
    return resolve_batch_size(fill_in(config, tier) if tier else config, 1)


def prepared(config: Config) -> tuple[Tokenizer, Tokens]:
    """Return the tokenizer and the tokens of the dataset, from the cache or prepared now."""
    _, tokenizer, tokens = prepare_quietly(config)
    return tokenizer, tokens


def new_model(config: Config, tokens: Tokens) -> MaskedLanguageModel:
    """Return a model with the vocabulary of the tokens, before its first step."""
    model = model_for_tokens(config, tokens)
    start_from_neighbours(model, tokens, config)
    return model


def new_learner(config: Config, tokens: Tokens) -> Learner:
    """Return the training step of a new model, in this process alone."""
    return Learner(new_model(config, tokens), config, World.alone())


def take_step(learner: Learner, rows: TrainingRows, number: int, learning_rate: float) -> None:
    """Read and mask the rows of a step, update the weights, and wait for the result."""
    config = learner.config
    masked = mask_batch(
        rows.batch(number),
        seed=config.seed,
        probability=config.mlm_probability,
        vocab_size=learner.model.config.vocab_size,
    )
    learner.step(masked, number, learning_rate).read()


def random_masked_batch(number: int, config: Config) -> MaskedBatch:
    """Return a batch of random tokens, masked as in training. number: of the batch."""
    batch = random_batch(number, config.vocab_size, config.batch_size, config.max_seq_len)
    return mask_batch(batch, seed=config.seed, probability=config.mlm_probability, vocab_size=config.vocab_size)


def scored_batches(config: Config, tokens: Tokens, n_batches: int) -> list[MaskedBatch]:
    """Return batches of 32 held-out sequences, masked as in a run's evaluation; at most n_batches."""
    return [
        mask_batch(batch, seed=config.seed, probability=EVALUATION_PROBABILITY, vocab_size=len(tokens.token_counts))
        for batch, _ in zip(evaluation_batches(tokens.held_out, 32), range(n_batches), strict=False)
    ]


@torch.no_grad()
def held_out_loss(learner: Learner, batches: list[MaskedBatch]) -> float:
    """Return the loss in nats per masked token."""
    learner.model.eval()
    return sum(masked_scores(*learner.hidden(batch))[0] for batch in batches) / sum(batch.n_masked for batch in batches)


def machine() -> str:
    """Return the cores, threads and the version of torch, for the heading of a table."""
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def median_and_range(ratios: Sequence[float], digits: int = 1) -> str:
    """Return, for example, "7.8 x (7.1 to 8.2)"."""
    return f"{statistics.median(ratios):.{digits}f} x ({min(ratios):.{digits}f} to {max(ratios):.{digits}f})"
