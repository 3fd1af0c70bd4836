"""Prepared sequences -> batches: a pure function of (seed, step, rank, world size).

Training reads an endless line of positions: position p is sequence number p % N of the permutation that (seed, epoch) give,
with epoch = p // N. A step takes the next global batch from the line, so every sequence comes once an epoch, every step has
the same shape on every rank, and resuming means setting the step.
Shapes: B sequences of a batch, T = max_seq_len, N sequences of the split.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from microbert.data.shards import Sequences
from microbert.data.tokenizer import N_SPECIAL
from microbert.runtime.counter_rng import permute

EVALUATION_EPOCH = 2**32  # held-out masks are drawn as if in this epoch, which training never reaches


@dataclasses.dataclass(frozen=True)
class Batch:
    """input_ids: int64 [B, T]. sequence_ids, epochs: int64 [B]. real: bool [B], False for rows that only fill the batch."""

    input_ids: np.ndarray
    sequence_ids: np.ndarray
    epochs: np.ndarray
    real: np.ndarray


def steps_in_run(n_sequences: int, epochs: int, global_batch_size: int) -> int:
    """Steps for `epochs` passes; the last batch is filled up where it is not full."""
    return -(-n_sequences * epochs // global_batch_size)


def training_batch(
    sequences: Sequences,
    *,
    step: int,
    epochs: int,
    global_batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """The rank's share of the global batch of a step (from 0): global_batch_size / world_size rows.

    Raises ValueError unless the world size divides the global batch size.
    """
    if global_batch_size % world_size:
        raise ValueError(f"a global batch of {global_batch_size} cannot be shared by {world_size} processes")
    n = len(sequences)
    rows = global_batch_size // world_size
    positions = step * global_batch_size + rank * rows + np.arange(rows)
    real = positions < n * epochs
    positions = np.minimum(positions, n * epochs - 1)
    epoch = positions // n
    ids = permute(positions % n, n, seed, epoch)
    return Batch(sequences.read(ids), ids, epoch, real)


def evaluation_batches(sequences: Sequences, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The rank's share of all sequences, in the order in which they lie on disk: every world_size-th batch. The last one is filled up."""
    for start in range(rank * batch_size, len(sequences), world_size * batch_size):
        ids = np.minimum(np.arange(start, start + batch_size), len(sequences) - 1)
        yield Batch(
            sequences.read(ids),
            ids,
            np.full(batch_size, EVALUATION_EPOCH),
            np.arange(start, start + batch_size) < len(sequences),
        )


def random_batch(number: int, vocab_size: int, batch_size: int, max_seq_len: int) -> Batch:
    """A batch of random tokens, to measure with; another one for each number."""
    input_ids = np.random.default_rng(number).integers(N_SPECIAL, vocab_size, (batch_size, max_seq_len))
    return Batch(input_ids, np.arange(batch_size), np.full(batch_size, number), np.ones(batch_size, bool))
