"""Batches of prepared sequences, as a pure function of (seed, step, rank, world size).

Training reads positions 0, 1, 2, ...: position p is element p % N of the permutation of epoch p // N, which depends on
(seed, epoch) alone. Each step reads the next global batch of positions. So every sequence occurs once per epoch, every
step has the same shape on every rank, and a run resumes by setting the step.
Shapes: B sequences of a batch, T = max_seq_len, N sequences of the split.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from microbert.data.shards import Sequences
from microbert.data.tokenizer import N_SPECIAL
from microbert.runtime.counter_rng import permute

EVALUATION_EPOCH = 2**32  # the epoch of held-out masks; training never reaches it


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences of one step.

    input_ids: int64 [B, T]. sequence_ids, epochs: int64 [B]. real: bool [B], False for rows that only fill the batch.
    """

    input_ids: np.ndarray
    sequence_ids: np.ndarray
    epochs: np.ndarray
    real: np.ndarray


def steps_in_run(n_sequences: int, epochs: int, global_batch_size: int) -> int:
    """Return the number of steps for `epochs` passes; the last batch is filled up if it is incomplete."""
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
    """Return this rank's share of the global batch: global_batch_size / world_size rows. Steps count from 0.

    Raises ValueError if the world size does not divide the global batch size.
    """
    if global_batch_size % world_size:
        raise ValueError(f"a global batch of {global_batch_size} cannot be split evenly across {world_size} processes")
    n = len(sequences)
    rows = global_batch_size // world_size
    positions = step * global_batch_size + rank * rows + np.arange(rows)
    real = positions < n * epochs
    positions = np.minimum(positions, n * epochs - 1)
    epoch = positions // n
    ids = permute(positions % n, n, seed, epoch)
    return Batch(sequences.read(ids), ids, epoch, real)


def evaluation_batches(sequences: Sequences, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Yield this rank's share of all sequences: every world_size-th batch, in order. The last batch is filled up."""
    n = len(sequences)
    for start in range(rank * batch_size, n, world_size * batch_size):
        positions = np.arange(start, start + batch_size)
        ids = np.minimum(positions, n - 1)
        yield Batch(sequences.read(ids), ids, np.full(batch_size, EVALUATION_EPOCH), positions < n)


def random_batch(number: int, vocab_size: int, batch_size: int, max_seq_len: int) -> Batch:
    """Return a batch of random tokens for measurements, a different one for each `number`."""
    input_ids = np.random.default_rng(number).integers(N_SPECIAL, vocab_size, (batch_size, max_seq_len))
    return Batch(input_ids, np.arange(batch_size), np.full(batch_size, number), np.ones(batch_size, bool))
