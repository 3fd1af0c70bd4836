"""The training split of rows = "documents": the text of all documents, and tables of pieces, read by index.

The text is one file of ids without special tokens. Another file has the pieces as start * SIZES + size, uint64: those
of each block of documents one after the other, and within a block one table after the other. A table has the pieces of
one plan for the rows of one kind.
Shapes: I ids, P pieces, K kinds of rows, B rows of a batch, N blocks.
"""

import dataclasses
import functools

import numpy as np

from microbert.data.fast_encode import ranges
from microbert.data.pieces import PLANS, Pieces
from microbert.data.tokenizer import CLS_ID, PAD_ID, SEP_ID
from microbert.errors import InputError

SIZES = 2**20  # more than the size of any piece


@dataclasses.dataclass(frozen=True)
class RowKind:
    """Rows of one length, either all full or all padded."""

    length: int
    is_padded: bool


@dataclasses.dataclass(frozen=True)
class Documents:
    """The training documents and their pieces.

    ids: uint16 or uint32 [I], memory-mapped. pieces: uint64 [P], memory-mapped. counts: int64 [N, PLANS, K], pieces of
    each table in each block.
    """

    ids: np.ndarray
    pieces: np.ndarray
    counts: np.ndarray
    row_lengths: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of rows of the first epoch."""
        return int(self.n_rows[0].sum())

    @functools.cached_property
    def kinds(self) -> list[RowKind]:
        """The kinds of rows, in the order of the tables."""
        return row_kinds(self.row_lengths)

    @functools.cached_property
    def n_rows(self) -> np.ndarray:
        """The number of rows of each kind in each plan, int64 [PLANS, K]."""
        return self.counts.sum(axis=0)

    @property
    def text_ids(self) -> np.ndarray:
        """The ids of all documents one after the other, without special tokens between them: uint16 or uint32 [I]."""
        return self.ids

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.pieces.nbytes + self.counts.nbytes

    @functools.cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """For each table and block, the number of rows before the block, and of pieces before these of the block."""
        flat = self.counts.reshape(len(self.counts), -1)  # [N, PLANS * K]
        return flat.cumsum(axis=0) - flat, (flat.cumsum() - flat.reshape(-1)).reshape(flat.shape)

    def numbers(self, kind: int, plans: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of pieces among all, int64 [B]. kind: of the rows. plans, rows: int64 [B]."""
        rows_before, pieces_before = self._places
        numbers = np.zeros(len(rows), np.int64)
        for plan in np.unique(plans).tolist():
            of_plan, table = plans == plan, plan * len(self.kinds) + kind
            block = np.searchsorted(rows_before[:, table], rows[of_plan], side="right") - 1
            numbers[of_plan] = pieces_before[block, table] + rows[of_plan] - rows_before[block, table]
        return numbers

    def read(self, kind: int, numbers: np.ndarray) -> np.ndarray:
        """Return the rows of these pieces: [CLS], the ids, [SEP], padding. Returns int64 [B, T].

        Raises InputError if the files are damaged.
        """
        found, length = self.pieces[numbers].astype(np.int64), self.kinds[kind].length
        starts, sizes = np.divmod(found, SIZES)
        if (
            (sizes < 1).any()
            or (sizes > length - 2).any()
            or (starts < 0).any()
            or (starts + sizes > len(self.ids)).any()
        ):
            raise InputError(
                "the token cache is damaged: a piece is not in the text. Delete cache_dir and run the command again"
            )
        rows = np.full((len(numbers), length), PAD_ID, np.int64)
        rows[:, 0] = CLS_ID
        rows[:, 1:-1][np.arange(length - 2) < sizes[:, None]] = self.ids[ranges(starts, sizes)]
        rows[np.arange(len(rows)), sizes + 1] = SEP_ID
        return rows


def row_kinds(row_lengths: tuple[int, ...]) -> list[RowKind]:
    """Return the kinds of rows: full and padded ones of each length."""
    return [RowKind(length, is_padded) for length in row_lengths for is_padded in (False, True)]


def in_tables(plans: list[Pieces], row_lengths: tuple[int, ...], first_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pieces of a block sorted by table, uint64 [P], and their counts, int64 [PLANS, K].

    plans: the pieces of each plan. first_id: the number of ids before the block.
    """
    widths = np.array(row_lengths) - 2
    sorted_pieces, counts = [], np.zeros((PLANS, 2 * len(row_lengths)), np.int64)
    for plan, pieces in enumerate(plans):
        kinds = 2 * pieces.lengths + (pieces.sizes < widths[pieces.lengths])
        order = np.argsort(kinds, kind="stable")
        sorted_pieces.append((((first_id + pieces.starts) * SIZES + pieces.sizes)[order]).astype(np.uint64))
        counts[plan] = np.bincount(kinds, minlength=counts.shape[1])
    return np.concatenate(sorted_pieces), counts
