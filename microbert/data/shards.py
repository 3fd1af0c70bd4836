"""The prepared corpus: memory-mapped sequences of token ids, read by index.

Each split is one file without a header, with one row per sequence, padded to max_seq_len. manifest.json contains its
shape. One file per block would need more file descriptors for a large corpus than a process may open. With
rows = "documents", the training split is running text with tables of its pieces (documents.py). One more file has the
beginnings of the held-out documents.
Shapes: N sequences of a split, B of a batch, T = max_seq_len, D held-out documents, V = vocabulary.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from microbert.data.corpus_counts import CorpusCounts
from microbert.data.documents import Documents
from microbert.data.pieces import PLANS
from microbert.data.tokenizer import N_SPECIAL
from microbert.errors import InputError
from microbert.runtime.files import read_json, system_trouble

FORMAT = 5  # increase it whenever the same input would produce other tokens
SPLITS = ("train", "held_out")
MANIFEST, TOKEN_COUNTS, HELD_OUT_DOCUMENTS = "manifest.json", "token_counts.npy", "held_out_documents.bin"
PIECES, PIECE_COUNTS = "pieces.bin", "piece_counts.npy"
LONGEST_ROW = 512  # tokens of the longest row that a model is trained or evaluated on, including [CLS] and [SEP]
DTYPES: dict[str, type[np.unsignedinteger]] = {"uint16": np.uint16, "uint32": np.uint32}


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of one split. rows: uint16 or uint32 [N, T], memory-mapped unless they are a sample."""

    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @property
    def text_ids(self) -> np.ndarray:
        """The ids of all sequences one after the other, special tokens included: uint16 or uint32 [N * T]."""
        return self.rows.reshape(-1)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Return sequences by index. ids: [B]; returns int64 [B, T]."""
        return self.rows[ids].astype(np.int64)

    def sample(self, at_most: int) -> "Sequences":
        """Return these sequences, or that many of them, evenly spaced, copied into memory."""
        n = len(self)
        return self if n <= at_most else Sequences(self.rows[np.arange(at_most) * n // at_most])


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The prepared corpus.

    held_out_documents: uint16 or uint32 [D, LONGEST_ROW - 2], memory-mapped: the first tokens of each held-out
    document, in the order of the corpus, without special tokens, padded with PAD_ID.
    token_counts: int64 [V], how often each ordinary token occurs in the training text; 0 for special tokens.
    unknown_characters: the most frequent characters missing from the vocabulary, with their counts in unknown words.
    held_out_below: documents whose hash (corpus.split_hash) is below this number are held out.
    """

    key: str
    folder: Path
    corpus_counts: CorpusCounts
    train: Sequences | Documents
    held_out: Sequences
    held_out_documents: np.ndarray
    token_counts: np.ndarray
    unknown_characters: dict[str, int]
    held_out_below: int

    @property
    def megabytes(self) -> float:
        """Return the size of the tokens on disk in MB."""
        return (self.train.nbytes + self.held_out.nbytes + self.held_out_documents.nbytes) / 1e6


def split_file(folder: Path, split: str) -> Path:
    """Return the path of the file with the sequences of a split."""
    return folder / f"{split}.bin"


def open_tokens(folder: Path, key: str, tokenizer: Tokenizer) -> Tokens:
    """Open what `prepare_tokens` has written.

    Raises InputError if it is damaged and OSError if the system cannot open it.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, not {FORMAT}")
        corpus_counts, below = CorpusCounts(**manifest["report"]), manifest["held_out_below"]
        characters = manifest["unknown_characters"]
        check_counts(dataclasses.asdict(corpus_counts) | {"held_out_below": below} | characters)
        if not all((corpus_counts.bytes, corpus_counts.words, corpus_counts.tokens)):
            raise ValueError("it counts no text")
        token_counts = _load_counts(folder / TOKEN_COUNTS, (tokenizer.get_vocab_size(),))
        train = (
            _open_documents(folder, manifest) if "row_lengths" in manifest else _open_split(folder, "train", manifest)
        )
        held_out = _open_split(folder, "held_out", manifest)
        shape = corpus_counts.held_out, LONGEST_ROW - 2
        documents = _open_rows(folder / HELD_OUT_DOCUMENTS, DTYPES[manifest["dtype"]], shape)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if system_trouble(error):
            raise
        raise InputError(
            f"the token cache is damaged ({error}): delete {folder} and run the same command again"
        ) from error
    token_counts[:N_SPECIAL] = 0
    return Tokens(key, folder, corpus_counts, train, held_out, documents, token_counts, characters, below)


def check_counts(values: dict[str, object]) -> None:
    """Raise ValueError unless all values are integers >= 0."""
    for name, value in values.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r:.50}, not a count")


def _open_split(folder: Path, split: str, manifest: dict) -> Sequences:
    check_counts({name: manifest[name] for name in (split, "max_seq_len")})
    shape = manifest[split], manifest["max_seq_len"]
    return Sequences(_open_rows(split_file(folder, split), DTYPES[manifest["dtype"]], shape))


def _open_documents(folder: Path, manifest: dict) -> Documents:
    """Raises ValueError, TypeError, KeyError or OSError if the files are damaged."""
    lengths, n_blocks = manifest["row_lengths"], manifest["blocks"]
    check_counts({"train": manifest["train"], "blocks": n_blocks} | {f"row length {n}": n for n in lengths})
    if not lengths or sorted(set(lengths)) != lengths or lengths[0] < 3:
        raise ValueError(f"row_lengths is {lengths!r:.50}")
    counts = _load_counts(folder / PIECE_COUNTS, (n_blocks, PLANS, 2 * len(lengths)))
    if counts.min(initial=0) < 0 or not counts.sum(axis=(0, 2)).all():
        raise ValueError(f"{PIECE_COUNTS} does not count pieces")
    ids = _open_rows(split_file(folder, "train"), DTYPES[manifest["dtype"]], (manifest["train"],))
    return Documents(ids, _open_rows(folder / PIECES, np.uint64, (int(counts.sum()),)), counts, tuple(lengths))


def _open_rows(path: Path, dtype: type[np.unsignedinteger], shape: tuple[int, ...]) -> np.ndarray:
    """Return the memory-mapped content of a file. Raises ValueError if it has another size, or none."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size or path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, not {size:,}")
    return np.asarray(np.memmap(path, dtype, "r", shape=shape))


def _load_counts(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of this shape, int64. Raises OSError or ValueError if the file is damaged."""
    try:
        counts = np.load(path, mmap_mode="r", allow_pickle=False)  # does not allocate what a damaged header asks for
    except Exception as error:
        if isinstance(error, (OSError, MemoryError)):
            raise
        # numpy evaluates the header as a Python literal and lets any exception of that through
        raise ValueError(f"{path.name}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(counts, np.ndarray):
        raise ValueError(f"{path.name} contains several arrays")
    if counts.dtype != np.int64 or counts.shape != shape:
        raise ValueError(f"{path.name} has dtype {counts.dtype} and shape {counts.shape}")
    return np.array(counts)
