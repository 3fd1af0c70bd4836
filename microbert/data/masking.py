"""BERT's masking, as a pure function of (seed, epoch, sequence, position).

The rates are those of Devlin et al. 2019 (arXiv:1810.04805, appendix A.1): of the chosen tokens, 80 % become [MASK],
10 % a random ordinary token, and 10 % are unchanged.
Shapes: B sequences, T tokens, M = n_slots masked slots per sequence.
"""

import dataclasses
import math

import numpy as np

from microbert.data.batches import Batch
from microbert.data.tokenizer import MASK_ID, N_SPECIAL
from microbert.runtime.counter_rng import random_bits, uniform

EVALUATION_PROBABILITY = 0.15  # for any training probability, so that held-out losses are comparable
IGNORED = -100  # the label of an unused slot
CHOICE, COUNT, KIND, REPLACEMENT = range(4)  # independent random streams


@dataclasses.dataclass(frozen=True)
class MaskedBatch:
    """Masked sequences and their labels.

    input_ids: int64 [B, T]. positions, labels: int64 [B, M]; unused slots have position 0 and the label IGNORED.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray

    @property
    def n_masked(self) -> int:
        """Return the number of masked tokens."""
        return int((self.labels != IGNORED).sum())


def n_slots(max_seq_len: int, probability: float) -> int:
    """Return the largest number of masked tokens of a sequence, so that shapes never change."""
    return max(1, math.ceil(probability * (max_seq_len - 2)))


def mask_batch(
    batch: Batch, *, seed: int, probability: float, vocab_size: int, all_as_mask: bool = False
) -> MaskedBatch:
    """Mask a share `probability` of the ordinary tokens of each sequence: exact on average, at least one token.

    Special tokens are never masked. Rows that are not real get no labels. vocab_size: replacements are drawn from the
    ordinary tokens below it. all_as_mask: every chosen token becomes [MASK], as in the blanks of a user.
    """
    input_ids = batch.input_ids.copy()
    n_rows, n_tokens = input_ids.shape
    ordinary = input_ids >= N_SPECIAL
    row_bits = random_bits(seed, batch.epochs, batch.sequence_ids)[:, None]  # [B, 1]

    # how many: probability * available, rounded up or down at random so that the mean is exact
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

    # what they become
    changed: int | np.ndarray = MASK_ID
    if not all_as_mask:
        kind = uniform(random_bits(row_bits, KIND, positions))
        drawn = N_SPECIAL + uniform(random_bits(row_bits, REPLACEMENT, positions)) * (vocab_size - N_SPECIAL)
        changed = np.where(kind < 0.8, MASK_ID, np.where(kind < 0.9, drawn.astype(np.int64), original))
    np.put_along_axis(input_ids, positions, np.where(used, changed, original), axis=1)  # position 0 is [CLS], unchanged
    return MaskedBatch(input_ids, positions, labels)
