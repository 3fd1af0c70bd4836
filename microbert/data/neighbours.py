"""How often tokens of the training text occur near each other.

Shapes: I ids, V vocabulary, P pairs of tokens.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from microbert.data.shards import Tokens
from microbert.data.tokenizer import N_SPECIAL
from microbert.runtime.waiting import never_stop

MOST_IDS = 4_000_000  # ids that are read, at most: more text changes the counts of frequent words little
SLICE = 4_096  # ids that are read in one place
COUNTED_IDS = 500_000  # ids whose pairs are in memory at a time
WINDOW = 4  # tokens: the largest distance of a pair, which counts 1 / distance


def sample_ids(tokens: Tokens) -> np.ndarray:
    """Return at most MOST_IDS ids of the training text, in slices from all of it: int64 [I].

    With rows = "documents", nothing separates documents, so a few pairs of two documents are counted too.
    """
    ids = tokens.train.text_ids
    n_slices = -(-len(ids) // SLICE)
    wanted = min(n_slices, MOST_IDS // SLICE)
    starts = np.arange(wanted) * n_slices // wanted * SLICE
    return np.concatenate([ids[start : start + SLICE] for start in starts]).astype(np.int64)


def count_neighbours(ids: np.ndarray, vocab_size: int, check_stop: Callable[[], None] = never_stop) -> Tensor:
    """Return how often tokens occur near each other, weighted by 1 / distance: symmetric sparse fp32 [V, V], coalesced.

    Special tokens have no neighbours. ids: int64 [I], running text. check_stop: called about every second; an exception
    from it ends the work.
    """
    counts = _sparse(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), vocab_size)
    for start in range(0, len(ids), COUNTED_IDS):
        for distance in range(1, WINDOW + 1):
            check_stop()
            second = ids[start + distance : start + distance + COUNTED_IDS]
            pairs = np.sort(np.stack([ids[start : start + len(second)], second]), axis=0)  # their order does not matter
            ordinary = torch.from_numpy(pairs[:, pairs[0] >= N_SPECIAL])
            counts = counts + _sparse(ordinary, torch.full((ordinary.shape[1],), 1 / distance), vocab_size)
    return (counts + counts.t()).coalesce()


def _sparse(pairs: Tensor, values: Tensor, vocab_size: int) -> Tensor:
    """Return a sparse matrix, [V, V], with the sum of each pair's values. pairs: int64 [2, P]. values: fp32 [P]."""
    return torch.sparse_coo_tensor(pairs, values, (vocab_size, vocab_size), check_invariants=False).coalesce()
