"""The prepared corpus: sequences of token ids on disk, memory-mapped, read by number.

Each split is one file of rows without a header, one row a sequence, padded to max_seq_len; manifest.json holds its
shape. With a file for each block, a large corpus would take more descriptors than a process may have.
Shapes: N sequences, B of them, T = max_seq_len, V = vocabulary.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from microbert.data.tokenizer import N_SPECIAL
from microbert.errors import InputError
from microbert.runtime.files import read_json, system_trouble

FORMAT = 4  # raise it whenever the same input would give other tokens
SPLITS = ("train", "held_out")
MANIFEST, TOKEN_COUNTS = "manifest.json", "token_counts.npy"
DTYPES = {"uint16": np.uint16, "uint32": np.uint32}


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the corpus. documents = train + held_out + unknown + unknown_start; rows = documents + empty.

    Tokens, words and unknown tokens are those of all documents, before any is left out or cut.
    """

    rows: int
    empty: int
    documents: int
    unknown: int  # documents left out because they hold no known token
    unknown_start: int  # documents left out because their first max_seq_len - 2 tokens hold no known one
    unknown_sequences: int  # packed sequences left out because they hold no known token
    train: int
    held_out: int
    duplicates: int  # documents with the text of an earlier one; they are kept
    characters: int
    bytes: int  # of the text, in UTF-8
    words: int
    tokens: int
    unknown_tokens: int

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / self.words

    @property
    def unknown_rate(self) -> float:
        return self.unknown_tokens / self.tokens

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats a token, so that it compares with that of another vocabulary."""
        return loss / math.log(2) * self.tokens / self.bytes


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of one split. rows: [N, T], uint16 or uint32, memory-mapped."""

    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Sequences by number. ids: [B]; returns int64 [B, T]."""
        return self.rows[ids].astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The prepared corpus.

    token_counts: int64 [V], how often each ordinary token is in the training sequences; 0 for special ones.
    unknown_characters: the most frequent ones that the vocabulary lacks, and how often they are in unknown words.
    held_out_below: documents whose hash (documents.split_hash) is below are held out.
    """

    key: str
    folder: Path
    report: Report
    train: Sequences
    held_out: Sequences
    token_counts: np.ndarray
    unknown_characters: dict[str, int]
    held_out_below: int

    @property
    def megabytes(self) -> float:
        return (self.train.rows.nbytes + self.held_out.rows.nbytes) / 1e6


def split_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.bin"


def open_tokens(folder: Path, key: str, tokenizer: Tokenizer) -> Tokens:
    """What `prepare_tokens` has written. Raises InputError where it is damaged, OSError where it cannot be opened."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, not {FORMAT}")
        report, below = Report(**manifest["report"]), manifest["held_out_below"]
        characters = manifest["unknown_characters"]
        check_numbers(dataclasses.asdict(report) | {"held_out_below": below} | characters)
        if not all((report.bytes, report.words, report.tokens)):
            raise ValueError("the report is of no text")
        token_counts = _load_counts(folder / TOKEN_COUNTS, tokenizer.get_vocab_size())
        train, held_out = (_open_split(folder, split, manifest) for split in SPLITS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if system_trouble(error):
            raise
        raise InputError(f"the token cache is damaged ({error}): delete {folder} and start again") from error
    token_counts[:N_SPECIAL] = 0
    return Tokens(key, folder, report, train, held_out, token_counts, characters, below)


def check_numbers(values: dict[str, object]) -> None:
    """Raise ValueError unless all values are whole numbers from 0 on."""
    for name, value in values.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r:.50}")


def _open_split(folder: Path, split: str, manifest: dict) -> Sequences:
    path, dtype = split_file(folder, split), DTYPES[manifest["dtype"]]
    shape = manifest[split], manifest["max_seq_len"]
    check_numbers(dict(zip((split, "max_seq_len"), shape)))
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size or path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, not {size:,}")
    return Sequences(np.asarray(np.memmap(path, dtype, "r", shape=shape)))


def _load_counts(path: Path, vocab_size: int) -> np.ndarray:
    """int64 [V]. Raises OSError or ValueError where the file is damaged."""
    try:
        counts = np.load(path, mmap_mode="r", allow_pickle=False)  # takes no memory for what a damaged header says
    except Exception as error:
        if isinstance(error, (OSError, MemoryError)):
            raise
        # numpy reads a header as Python, and lets through whatever comes of that
        raise ValueError(f"{path.name}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(counts, np.ndarray):
        raise ValueError(f"{path.name} holds several arrays")
    if counts.dtype != np.int64 or counts.shape != (vocab_size,):
        raise ValueError(f"{path.name} has {counts.dtype} of the shape {counts.shape}")
    return np.array(counts)
