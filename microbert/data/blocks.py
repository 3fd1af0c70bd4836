"""Blocks of encoded documents on disk: the intermediate files of `prepare_tokens`, from which it resumes.

A block is two files: block-NNNNN.npz contains the hashes uint64 [D], lengths int64 [D] and ids [I] of its documents,
block-NNNNN.json its counts. The second exists only if the first is complete.
Shapes: D documents of a block, I ids of a block.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from microbert.config.constants import Config
from microbert.data.corpus import HELD_OUT_SHARE, Position, clean, split_hash
from microbert.data.fast_encode import Encoder, ranges
from microbert.data.shards import LONGEST_ROW, check_counts
from microbert.data.tokenizer import N_SPECIAL, UNK_ID, load_tokenizer
from microbert.errors import InputError
from microbert.runtime.files import read_json, system_trouble, write_atomic, write_json

HASHES_AT_A_TIME = 2_000_000  # hashes sorted in memory to count duplicates
UNKNOWN_RECORDED = 200  # the most frequent unknown characters of a block

_encoder: Encoder  # of this process
_starts_word: np.ndarray  # bool [V], True for [UNK] and for ordinary tokens that start a word


@dataclasses.dataclass(frozen=True)
class Block:
    """Counts of a block, with the names of CorpusCounts.

    unknown_characters: the most frequent ones with their counts. smallest, largest: among the hashes of the documents
    that are not skipped. end: position after the block.
    """

    rows: int
    empty: int
    documents: int
    unknown: int
    unknown_start: int
    characters: int
    bytes: int
    words: int
    tokens: int
    unknown_tokens: int
    unknown_characters: dict[str, int]
    smallest: int
    largest: int
    end: Position

    @property
    def used(self) -> int:
        """Return the number of documents that are not skipped."""
        return self.documents - self.unknown - self.unknown_start


def token_dtype(config: Config) -> type[np.unsignedinteger]:
    """Return the type in which ids are stored."""
    return np.uint16 if config.vocab_size <= 2**16 else np.uint32


def set_encoder(tokenizer: Path) -> None:
    """Prepare this process for `write_block`.

    tokenizer: a path, because a new process that dies while it receives a large argument blocks the sender.
    """
    global _encoder, _starts_word
    loaded = load_tokenizer(tokenizer)
    _encoder = Encoder(loaded)
    tokens = map(loaded.id_to_token, range(loaded.get_vocab_size()))
    _starts_word = np.array([not (token or "").startswith("##") for token in tokens])
    _starts_word[[i for i in range(N_SPECIAL) if i != UNK_ID]] = False


def write_block(rows: list[str | None], end: Position, number: int, config: Config, folder: Path) -> Block:
    """Encode rows, write them as a block, and return its counts. Documents without a known token are skipped."""
    texts = [text for text in map(clean, rows) if text]
    hashes = np.array([split_hash(text, config.seed) for text in texts], np.uint64)
    ids, lengths = _encoder.encode(texts)
    counts = np.bincount(ids, minlength=len(_starts_word))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    used = lengths if config.packing else np.minimum(lengths, config.max_seq_len - 2)
    known_before = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(ids >= N_SPECIAL, out=known_before[1:])
    keep = known_before[starts + used] > known_before[starts]  # [D]
    is_unknown = known_before[ends] == known_before[starts]
    hashes, lengths = hashes[keep], lengths[keep]
    if not config.packing:
        longest = np.where(_may_be_held_out(hashes), max(LONGEST_ROW, config.max_seq_len), config.max_seq_len)
        lengths = np.minimum(lengths, longest - 2)
    stored_ids = ids[ranges(starts[keep], lengths)].astype(token_dtype(config))
    arrays = {"hashes": hashes, "lengths": lengths, "ids": stored_ids}
    write_atomic(_arrays_path(folder, number), lambda file: np.savez(file, **arrays))
    block = Block(
        rows=len(rows),
        empty=len(rows) - len(texts),
        documents=len(texts),
        unknown=int(is_unknown.sum()),
        unknown_start=int((~keep & ~is_unknown).sum()),
        characters=sum(map(len, texts)),
        bytes=sum(len(text.encode()) for text in texts),
        words=int(counts[_starts_word].sum()),
        tokens=len(ids),
        unknown_tokens=int(counts[UNK_ID]),
        unknown_characters=dict(_encoder.unknown_characters.most_common(UNKNOWN_RECORDED)),
        smallest=int(hashes.min(initial=2**64 - 1)),
        largest=int(hashes.max(initial=0)),
        end=end,
    )
    write_json(_counts_path(folder, number), dataclasses.asdict(block))
    return block


def _may_be_held_out(hashes: np.ndarray) -> np.ndarray:
    """Return which documents of a block the whole corpus may hold out, bool [D]: its share, or the smallest hash."""
    return (hashes < np.uint64(2**64 * HELD_OUT_SHARE)) | (hashes == hashes.min(initial=2**64 - 1))


def finished_blocks(folder: Path) -> tuple[list[Block], str]:
    """Return the counts of the blocks that an interrupted run has written, up to the first missing or damaged one.

    Also returns what is damaged, or "". Raises OSError if the system cannot read a file.
    """
    blocks: list[Block] = []
    while True:
        path = _counts_path(folder, len(blocks))
        try:
            blocks.append(_read_counts(path, blocks[-1].end.rows if blocks else 0))
        except FileNotFoundError:
            return blocks, ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            if system_trouble(error):
                raise
            return blocks, f"{path} is damaged ({error}): preparing again from there"


def _read_counts(path: Path, rows_before: int) -> Block:
    """Raise OSError, ValueError, KeyError or TypeError if the file is missing or damaged."""
    stored = read_json(path)
    check_counts({name: value for name, value in stored.items() if name not in ("end", "unknown_characters")})
    check_counts(stored["end"] | stored["unknown_characters"])
    block = Block(**{**stored, "end": Position(**stored["end"])})
    if block.end.rows != rows_before + block.rows or block.documents != block.rows - block.empty or block.used < 0:
        raise ValueError("its counts are inconsistent")
    return block


def read_block(folder: Path, number: int, config: Config, *names: str) -> list[np.ndarray]:
    """Return the arrays with these names, in the order hashes, lengths, ids.

    Raises InputError if the file is damaged and OSError if the system cannot read it.
    """
    path = _arrays_path(folder, number)
    dtypes = {"hashes": np.uint64, "lengths": np.int64, "ids": token_dtype(config)}
    try:
        with np.load(path, allow_pickle=False) as block:
            arrays: dict[str, np.ndarray] = {name: block[name] for name in dtypes if name in names}
        if any(array.dtype != dtypes[name] or array.ndim != 1 for name, array in arrays.items()):
            raise ValueError("its arrays are not those of a block")
        if "lengths" in arrays:
            lengths = arrays["lengths"]
            if lengths.min(initial=1) < 1 or len(lengths) != len(arrays["hashes"]):
                raise ValueError("its arrays are inconsistent")
            if "ids" in arrays and lengths.sum() != len(arrays["ids"]):
                raise ValueError("its lengths are inconsistent")
        return list(arrays.values())
    except Exception as error:  # numpy and zipfile raise any exception for a damaged file
        if system_trouble(error):
            raise
        raise InputError(f"{path} is damaged ({error}): delete {folder} and run the same command again") from error


def count_distinct(folder: Path, n_blocks: int, documents: int, config: Config) -> int:
    """Return the number of distinct hashes in all blocks.

    Hashes are sorted one range of values after another, so that memory is bounded.
    """
    n_ranges = -(-documents // HASHES_AT_A_TIME)
    edges = [number * 2**64 // n_ranges for number in range(n_ranges + 1)]
    distinct = 0
    for first, end in itertools.pairwise(edges):
        of_range = []
        for number in range(n_blocks):
            [hashes] = read_block(folder, number, config, "hashes")
            of_range.append(hashes[(hashes >= np.uint64(first)) & (hashes <= np.uint64(end - 1))])
        in_range = np.concatenate(of_range)
        in_range.sort()  # np.unique uses several times as much memory
        distinct += min(1, len(in_range)) + int(np.count_nonzero(in_range[1:] != in_range[:-1]))
    return distinct


def remove_blocks(folder: Path) -> None:
    """Remove all blocks of a folder."""
    for path in folder.glob("block-*"):
        path.unlink()


def _arrays_path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:05d}.npz"


def _counts_path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:05d}.json"
