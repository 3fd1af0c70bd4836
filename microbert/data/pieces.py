"""Cut documents into pieces, each for a row of one of several lengths.

A piece never crosses the end of a document. The cuts are functions of (seed, plan, document, part, piece), so they do
not depend on blocks, processes or interruptions.
Shapes: D documents, L row lengths, P pieces.
"""

import dataclasses

import numpy as np

from microbert.config.constants import LONGEST_PIECE
from microbert.runtime.counter_rng import random_bits, uniform

PLANS = 4  # ways to cut the documents: epoch e uses plan e % PLANS
MOST_WASTE = 0.2  # share of a row that repeats earlier tokens or is padding, at most, unless the row is the shortest
LONGEST_PART = LONGEST_PIECE  # tokens of a document that are cut one after the other; longer documents have several
STREAM = 2**34  # separates these random numbers from those of masks and order, whose counters are epochs


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces of a text: `starts` int64 [P], numbers of tokens `sizes` int64 [P], row lengths by index int64 [P].

    A piece has the length of its row minus two, for [CLS] and [SEP], or it is a whole document that is shorter.
    """

    starts: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray


def cut_documents(
    sizes: np.ndarray, first: int, seed: int, plan: int, row_lengths: tuple[int, ...], weights: list[float]
) -> Pieces:
    """Cut consecutive documents. Every token is in at least one piece, and the first piece starts the document.

    Row lengths are drawn with these weights while they fit. The last pieces fill their rows too: they begin earlier if
    necessary, so that only a document that is shorter than its row is padded. sizes: int64 [D]. first: number of the
    first document among all.
    """
    widths = np.array(row_lengths) - 2
    limits = np.cumsum(weights) / np.sum(weights)
    n_parts = -(-sizes // LONGEST_PART)
    document = np.repeat(np.arange(len(sizes)), n_parts)
    part = np.arange(len(document)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    begins = (np.cumsum(sizes) - sizes)[document]
    position = begins + part * LONGEST_PART
    ends = np.minimum(position + LONGEST_PART, begins + sizes[document])
    found = [np.zeros((3, 0), np.int64)]
    number = 0
    while len(position):
        drawn = uniform(random_bits(seed, STREAM, plan, first + document, part, number))
        rest = ends - position
        index = np.searchsorted(limits[:-1], drawn, side="right")
        index = np.where(widths[index] <= rest, index, _length_for(rest, widths))
        size = np.minimum(widths[index], ends - begins)
        start = np.minimum(position, ends - size)
        found.append(np.stack([start, size, index]))
        position = start + size
        goes_on = position < ends
        document, part, begins, position, ends = (x[goes_on] for x in (document, part, begins, position, ends))
        number += 1
    return Pieces(*np.concatenate(found, axis=1))


def _length_for(rest: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return the index of the shortest row that holds `rest` tokens, or of the one before if it wastes too much."""
    index = np.minimum(np.searchsorted(widths, rest), len(widths) - 1)
    is_wasteful = (index > 0) & (widths[index] - rest > MOST_WASTE * widths[index])
    return index - is_wasteful
