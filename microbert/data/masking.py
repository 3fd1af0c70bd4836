"""BERT's masking: ids -> masked ids, masked positions, labels; a pure function of (seed, epoch, sequence, position).

The rates are those of Devlin et al. 2019 (arXiv:1810.04805, appendix A.1): of the chosen tokens 80 % become [MASK], 10 % a
random ordinary token, 10 % stay.
Shapes: B sequences, T tokens, M = n_slots masked slots a sequence.
"""

import dataclasses
import math

import numpy as np

from microbert.data.batches import Batch
from microbert.data.tokenizer import MASK_ID, N_SPECIAL
from microbert.runtime.counter_rng import random_bits, uniform

EVALUATION_PROBABILITY = 0.15  # whatever a run trains with, so that losses compare
IGNORED = -100  # the label of a slot that holds no masked token
CHOICE, COUNT, KIND, REPLACEMENT = range(4)  # independent streams of random numbers


@dataclasses.dataclass(frozen=True)
class MaskedBatch:
    """input_ids: int64 [B, T]. positions, labels: int64 [B, M]; unused slots have position 0 and the label IGNORED."""

    input_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray

    @property
    def n_masked(self) -> int:
        return int((self.labels != IGNORED).sum())


def n_slots(max_seq_len: int, probability: float) -> int:
    """Slots that are enough for every sequence, so that shapes never change."""
    return max(1, math.ceil(probability * (max_seq_len - 2)))


def mask_batch(batch: Batch, *, seed: int, probability: float, vocab_size: int) -> MaskedBatch:
    """Masks `probability` of the ordinary tokens of each sequence: exactly so on average, at least one, special tokens never.

    vocab_size: the number of tokens from which replacements are drawn. A row that is not real gets no labels.
    """
    input_ids = batch.input_ids.copy()
    n_rows, n_tokens = input_ids.shape
    ordinary = input_ids >= N_SPECIAL
    row_bits = random_bits(seed, batch.epochs, batch.sequence_ids)[:, None]  # [B, 1]

    # how many: probability * n, rounded up or down at random so that the mean is exact
    available = ordinary.sum(axis=1)
    wanted = np.floor(probability * available + uniform(random_bits(row_bits, COUNT))[:, 0]).astype(np.int64)
    wanted = np.minimum(np.maximum(wanted, 1), available) * batch.real

    # which: the positions with the smallest random keys
    keys = np.where(ordinary, uniform(random_bits(row_bits, CHOICE, np.arange(n_tokens))), 1.0)
    slots = n_slots(n_tokens, probability)
    positions = np.argsort(keys, axis=1, kind="stable")[:, :slots]  # [B, M]
    used = np.arange(slots) < wanted[:, None]
    positions = np.where(used, positions, 0)
    original = np.take_along_axis(input_ids, positions, axis=1)
    labels = np.where(used, original, IGNORED)

    # into what
    kind = uniform(random_bits(row_bits, KIND, positions))
    drawn = N_SPECIAL + uniform(random_bits(row_bits, REPLACEMENT, positions)) * (vocab_size - N_SPECIAL)
    changed = np.where(kind < 0.8, MASK_ID, np.where(kind < 0.9, drawn.astype(np.int64), original))
    np.put_along_axis(input_ids, positions, np.where(used, changed, original), axis=1)  # position 0 is [CLS], and stays
    return MaskedBatch(input_ids, positions, labels)
