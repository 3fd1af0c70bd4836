"""Arrange encoded documents in sequences of max_seq_len tokens: one document per sequence, or packed running text.

With rows = "documents", the training documents stay running text, and tables of pieces say which of it are rows.
Shapes: D documents, I ids, N sequences, T = max_seq_len, P pieces, K kinds of rows.
"""

import dataclasses
from pathlib import Path

import numpy as np

from microbert.config.constants import Config
from microbert.data.blocks import read_block, token_dtype
from microbert.data.documents import in_tables
from microbert.data.fast_encode import ranges
from microbert.data.pieces import PLANS, Pieces, cut_documents
from microbert.data.row_lengths import draw_weights, row_lengths
from microbert.data.shards import LONGEST_ROW, SPLITS
from microbert.data.tokenizer import CLS_ID, N_SPECIAL, PAD_ID, SEP_ID

HELD_OUT = SPLITS.index("held_out")


@dataclasses.dataclass(frozen=True)
class PackedPart:
    """The packed sequences of a split that begin in one block: `tokens` tokens, `skip` tokens after its start.

    blocks: the blocks that contain these tokens. is_first: whether the text of the split begins with this block.
    """

    skip: int
    tokens: int
    blocks: list[int]
    is_first: bool


@dataclasses.dataclass(frozen=True)
class DocumentsPart:
    """The training documents of a block for rows = "documents": how many documents and ids come before them."""

    documents_before: int
    ids_before: int


@dataclasses.dataclass(frozen=True)
class Arranged:
    """What the documents of a block become.

    sequences: those of each split [N, T]; for training on documents, the ids [I]. n_unknown: sequences skipped because
    they contain no known token; of pieces, those of the first plan. token_counts: of the training tokens, int64 [V].
    held_out_documents: the first tokens of each held-out document, padded, [D, LONGEST_ROW - 2]. pieces, piece_counts:
    uint64 [P] and int64 [PLANS, K], as `in_tables` returns them; empty for packed rows.
    """

    sequences: list[np.ndarray]
    n_unknown: int
    token_counts: np.ndarray
    held_out_documents: np.ndarray
    pieces: np.ndarray
    piece_counts: np.ndarray


def split_masks(hashes: np.ndarray, below: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which documents belong to each of SPLITS, bool [D]. Documents with a hash < `below` are held out."""
    is_held_out = hashes < np.uint64(below)
    return ~is_held_out, is_held_out


def packed_parts(documents: list[int], ids: list[int], max_seq_len: int) -> list[PackedPart]:
    """Return for each block the packed sequences that begin in it.

    Sequences continue in the next blocks, so only the last one of a split is padded.
    documents, ids: how many documents and ids of the split each block contains.
    """
    width = max_seq_len - 2
    ends: list[int] = []
    total = 0
    for of_documents, of_ids in zip(documents, ids, strict=True):
        total += of_ids + of_documents - (total == 0 and of_documents > 0)  # [SEP] before each document but the first
        ends.append(total)
    parts = []
    for number, end in enumerate(ends):
        start = ends[number - 1] if number else 0
        first = -(-start // width) * width
        last = min(total, first + -(-(end - first) // width) * width)
        blocks = [number]
        while ends[blocks[-1]] < last:
            blocks.append(next(other for other in range(blocks[-1] + 1, len(ends)) if ends[other] > ends[blocks[-1]]))
        is_empty = first >= end
        parts.append(
            PackedPart(0, 0, [], False) if is_empty else PackedPart(first - start, last - first, blocks, start == 0)
        )
    return parts


def arrange_block(
    number: int,
    parts: tuple[PackedPart | DocumentsPart, ...],
    below: int,
    config: Config,
    folder: Path,
    vocab_size: int,
) -> Arranged:
    """Arrange the documents of a block. parts: of each split, the packed sequences that begin in it, or its pieces."""
    sequences, n_unknown = [], 0
    pieces, piece_counts = np.zeros(0, np.uint64), np.zeros((0, 0), np.int64)
    for split, part in enumerate(parts):
        if isinstance(part, DocumentsPart):
            ids, lengths = _documents(folder, number, split, below, config)
            sequences.append(ids)
            pieces, piece_counts, n_unknown = _pieces_of(ids, lengths, part, config)
            continue
        if config.packing:
            texts: list[np.ndarray] = [np.zeros(0, token_dtype(config))]
            wanted = part.skip + part.tokens
            for other in part.blocks:
                ids, lengths = _documents(folder, other, split, below, config, wanted)
                texts.append(packed_text(ids, lengths, part.is_first and other == number)[:wanted])
                wanted -= len(texts[-1])
            rows = packed_sequences(np.concatenate(texts)[part.skip :], config.max_seq_len)
        else:
            rows = truncated_sequences(*_documents(folder, number, split, below, config), config.max_seq_len)
        is_known = (rows >= N_SPECIAL).any(axis=1)
        sequences.append(rows[is_known])
        n_unknown += int((~is_known).sum())
    beginnings = first_tokens(*_documents(folder, number, HELD_OUT, below, config), LONGEST_ROW - 2)
    token_counts = np.bincount(sequences[0].reshape(-1), minlength=vocab_size)
    return Arranged(sequences, n_unknown, token_counts, beginnings, pieces, piece_counts)


def _pieces_of(
    ids: np.ndarray, lengths: np.ndarray, part: DocumentsPart, config: Config
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the pieces and their counts as `in_tables` does, and the pieces of the first plan that are skipped."""
    known_before = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(ids >= N_SPECIAL, out=known_before[1:])
    of_rows, plans, n_unknown = row_lengths(config), [], 0
    for plan in range(PLANS):
        pieces = cut_documents(lengths, part.documents_before, config.seed, plan, of_rows, draw_weights(of_rows))
        is_known = known_before[pieces.starts + pieces.sizes] > known_before[pieces.starts]
        plans.append(Pieces(pieces.starts[is_known], pieces.sizes[is_known], pieces.lengths[is_known]))
        n_unknown += 0 if plan else int((~is_known).sum())
    return *in_tables(plans, of_rows, part.ids_before), n_unknown


def _documents(
    folder: Path, number: int, split: int, below: int, config: Config, tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids [I] and lengths [D] of a split's documents in a block.

    tokens: return only the first documents with this many tokens; None returns all documents.
    """
    hashes, lengths, ids = read_block(folder, number, config, "hashes", "lengths", "ids")
    chosen = np.flatnonzero(split_masks(hashes, below)[split])
    if tokens is not None:
        chosen = chosen[: np.searchsorted(np.cumsum(lengths[chosen]), tokens) + 1]
    starts = np.cumsum(lengths) - lengths
    return ids[ranges(starts[chosen], lengths[chosen])], lengths[chosen]


def truncated_sequences(ids: np.ndarray, lengths: np.ndarray, max_seq_len: int) -> np.ndarray:
    """Return one sequence per document: [CLS], its first max_seq_len - 2 tokens, [SEP], padding.

    ids: [I], lengths: [D]; returns [D, T].
    """
    sequences = np.full((len(lengths), max_seq_len), PAD_ID, ids.dtype)
    sequences[:, 0] = CLS_ID
    sequences[:, 1:-1] = first_tokens(ids, lengths, max_seq_len - 2)
    sequences[np.arange(len(lengths)), np.minimum(lengths, max_seq_len - 2) + 1] = SEP_ID
    return sequences


def first_tokens(ids: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Return the first `width` ids of each document, padded. ids: [I], lengths: [D]; returns [D, width]."""
    kept = np.minimum(lengths, width)
    rows = np.full((len(lengths), width), PAD_ID, ids.dtype)
    rows[np.arange(width) < kept[:, None]] = ids[ranges(np.cumsum(lengths) - lengths, kept)]
    return rows


def packed_text(ids: np.ndarray, lengths: np.ndarray, is_first: bool) -> np.ndarray:
    """Return the concatenated documents, with [SEP] before each one except the first of all. ids: [I], lengths: [D]."""
    return np.insert(ids, np.cumsum(lengths) - lengths, SEP_ID)[int(is_first) :]


def packed_sequences(text: np.ndarray, max_seq_len: int) -> np.ndarray:
    """Split running text into sequences: [CLS], max_seq_len - 2 tokens, [SEP]. Pad only the last. Returns [N, T]."""
    width = max_seq_len - 2
    n = -(-len(text) // width)
    sequences = np.full((n, max_seq_len), PAD_ID, text.dtype)
    inner = np.full(n * width, PAD_ID, text.dtype)
    inner[: len(text)] = text
    sequences[:, 0] = CLS_ID
    sequences[:, 1:-1] = inner.reshape(n, width)
    sequences[:, -1] = SEP_ID
    if n:
        last = len(text) - (n - 1) * width
        sequences[-1, last + 1 :] = PAD_ID
        sequences[-1, last + 1] = SEP_ID
    return sequences
