"""The rows of each training step, as a pure function of (seed, step, rank, world size), for both kinds of rows.

With rows = "documents", the rows of a step are of one kind: of one length, and either full or padded. Those of each
kind follow each other in batches as sequences do in batches.py: epoch after epoch, each in an order of its own. The
batches of all kinds are mixed: batch j of n of a kind is at time (j + u) / n of the run, with a random u in [0, 1).
Shapes: B rows, K kinds of rows.
"""

from collections import Counter
from typing import NamedTuple, Protocol

import numpy as np

from microbert.config.constants import ResolvedConfig
from microbert.data.batches import Batch, steps_in_run, training_batch
from microbert.data.documents import Documents
from microbert.data.pieces import PLANS
from microbert.data.row_lengths import rows_of_step
from microbert.data.shards import Sequences, Tokens
from microbert.runtime.counter_rng import permute, random_bits, uniform

STREAM = 2**35  # separates these random numbers from those of masks, whose counters are epochs
ALMOST_1 = 1 - 2**-40
STEPS_AT_A_TIME = 4096  # steps whose kinds are in memory


class Seen(NamedTuple):
    """What a run has trained on: epochs, rows, and tokens of these rows, padding included."""

    epochs: float
    rows: int
    tokens: int


class TrainingRows(Protocol):
    """The training rows of a run. steps: of all epochs."""

    steps: int

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return a process's share of the rows of a step. Steps count from 0."""
        ...

    def seen(self, step: int) -> Seen:
        """Return what the first `step` steps train on."""
        ...

    def steps_of_lengths(self) -> dict[int, int]:
        """Return the number of steps by the length of their rows, at least 1 each."""
        ...


def training_rows(tokens: Tokens, config: ResolvedConfig) -> TrainingRows:
    """Return the training rows of a run."""
    if isinstance(tokens.train, Documents):
        return DocumentRows(tokens.train, config)
    return PackedRows(tokens.train, config)


class PackedRows(TrainingRows):
    """Sequences of max_seq_len tokens."""

    def __init__(self, sequences: Sequences, config: ResolvedConfig) -> None:
        self._sequences, self._config = sequences, config
        self.steps = steps_in_run(len(sequences), config.epochs, config.global_batch_size)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        return training_batch(
            self._sequences,
            step=step,
            epochs=self._config.epochs,
            global_batch_size=self._config.global_batch_size,
            seed=self._config.seed,
            rank=rank,
            world_size=world_size,
        )

    def seen(self, step: int) -> Seen:
        n = len(self._sequences)
        rows = min(step * self._config.global_batch_size, n * self._config.epochs)
        return Seen(rows / n, rows, rows * self._config.max_seq_len)

    def steps_of_lengths(self) -> dict[int, int]:
        return {self._config.max_seq_len: self.steps}


class DocumentRows(TrainingRows):
    """Documents and pieces of them."""

    def __init__(self, documents: Documents, config: ResolvedConfig) -> None:
        self._documents, self._seed, self._epochs = documents, config.seed, config.epochs
        of_step = rows_of_step(config)
        self._lengths = np.array([kind.length for kind in documents.kinds])
        self._batch_rows = np.array([of_step[kind.length] for kind in documents.kinds])
        self._rows_before = np.zeros((PLANS + 1, len(documents.kinds)), np.int64)  # each plan, and after the last one
        documents.n_rows.cumsum(axis=0, out=self._rows_before[1:])
        cycles, rest = divmod(config.epochs, PLANS)
        self._n_rows = cycles * self._rows_before[-1] + self._rows_before[rest]  # [K], of the run
        n_batches = -(-self._n_rows // self._batch_rows)
        self._mix = Mix(n_batches, config.seed, n_batches * self._batch_rows > self._n_rows)
        self.steps = self._mix.steps

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """As TrainingRows.batch. A share is filled up with rows that are not real, so that all have one shape."""
        kind, number = self._mix.batch_of(step)
        n_rows = int(self._batch_rows[kind])
        share = -(-n_rows // world_size)
        places = rank * share + np.arange(share)
        positions = number * n_rows + places
        real = (places < n_rows) & (positions < self._n_rows[kind])
        positions = np.minimum(positions, self._n_rows[kind] - 1)
        cycles, within = np.divmod(positions, self._rows_before[-1, kind])
        plans = np.asarray(np.searchsorted(self._rows_before[:, kind], within, side="right")) - 1
        epochs = cycles * PLANS + plans
        rows = within - self._rows_before[plans, kind]
        for epoch, plan in {(epoch, epoch % PLANS) for epoch in epochs.tolist()}:
            of_epoch = epochs == epoch
            n_of_plan = int(self._documents.n_rows[plan, kind])
            rows[of_epoch] = permute(rows[of_epoch], n_of_plan, self._seed, STREAM, epoch, kind)
        numbers = self._documents.numbers(kind, plans, rows)
        return Batch(self._documents.read(kind, numbers), numbers, epochs, real)

    def seen(self, step: int) -> Seen:
        rows = np.minimum(self._mix.batches_before(step) * self._batch_rows, self._n_rows)
        tokens, all_tokens = rows @ self._lengths, self._n_rows @ self._lengths
        return Seen(float(self._epochs * tokens / all_tokens), int(rows.sum()), int(tokens))

    def steps_of_lengths(self) -> dict[int, int]:
        steps: Counter[int] = Counter()
        for length, n_batches in zip(self._lengths.tolist(), self._mix.n_batches.tolist(), strict=True):
            steps[length] += n_batches
        return {length: n for length, n in steps.items() if n}


class Mix:
    """The order in which the batches of several kinds alternate: random, and even over the run.

    A last batch that is not full comes at the end of the run, where the learning rate is near 0: an update from a few
    rows is noise.

    The order of a few thousand steps is computed at a time, from the number of batches before them.
    """

    def __init__(self, n_batches: np.ndarray, seed: int, is_incomplete: np.ndarray) -> None:
        """n_batches: of each kind, int64 [K]. is_incomplete: whether the last one is not full, bool [K]."""
        self.n_batches, self._seed, self._is_incomplete = n_batches, seed, is_incomplete
        self.steps = int(n_batches.sum())
        self._n_parts = -(-self.steps // STEPS_AT_A_TIME)
        self._before = self._batches_before_part(np.arange(self._n_parts + 1)[:, None])  # [n_parts + 1, K]
        self._steps_before = self._before.sum(axis=1)
        self._part, self._order = -1, np.zeros((2, 0), np.int64)  # the last part in use: kinds and numbers of batches

    def _batches_before_part(self, part: np.ndarray) -> np.ndarray:
        """Return the number of batches of each kind in the time before a part, computed in integers."""
        whole, rest = np.divmod(part * self.n_batches, self._n_parts)
        return whole + (self._offsets(np.arange(len(self.n_batches)), whole) * self._n_parts < rest)

    def _offsets(self, kinds: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        is_last = self._is_incomplete[kinds] & (numbers == self.n_batches[kinds] - 1)
        return np.where(is_last, ALMOST_1, uniform(random_bits(self._seed, STREAM, kinds, numbers)))

    def _load(self, step: int) -> int:
        """Compute the order of the part that has this step, and return the step's place in it."""
        part = int(np.searchsorted(self._steps_before, step, side="right")) - 1
        if part != self._part:
            first, sizes = self._before[part], self._before[part + 1] - self._before[part]
            kinds = np.repeat(np.arange(len(sizes)), sizes)
            numbers = np.arange(len(kinds)) - (np.cumsum(sizes) - sizes - first)[kinds]
            times = (numbers + self._offsets(kinds, numbers)) / self.n_batches[kinds]
            self._part, self._order = part, np.stack([kinds, numbers])[:, np.argsort(times, kind="stable")]
        return step - int(self._steps_before[part])

    def batch_of(self, step: int) -> tuple[int, int]:
        """Return the kind of a step's batch, and the number of the batch among those of this kind."""
        place = self._load(step)
        kind, number = self._order[:, place].tolist()
        return kind, number

    def batches_before(self, step: int) -> np.ndarray:
        """Return the number of batches of each kind in the first `step` steps, int64 [K]."""
        if step >= self.steps:
            return self.n_batches
        place = self._load(step)
        return self._before[self._part] + np.bincount(self._order[0, :place], minlength=len(self.n_batches))
