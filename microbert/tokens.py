"""The prepared corpus: sequences of token ids on disk, memory-mapped, read by number.

The shards of a split hold the sequences of one block of documents each, one row a sequence, padded to max_seq_len.
Shapes: N sequences, B of them, T = max_seq_len, V = vocabulary.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .config import InputError
from .files import read_json
from .tokenizer import N_SPECIAL, UNK_ID

FORMAT = 3  # raise it whenever the same input would give other shards
SPLITS = ("train", "held_out")
MANIFEST, TOKEN_COUNTS = "manifest.json", "token_counts.npy"


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the corpus. documents = train + held_out + without_tokens; rows = documents + empty."""

    rows: int
    empty: int
    documents: int
    without_tokens: int  # left out because no known token is in them
    train: int
    held_out: int
    duplicates: int  # documents whose text stood in an earlier one; they are kept
    characters: int
    bytes: int  # of the text, in UTF-8
    tokens: int  # of the text, before documents are cut

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats a token, so that it compares with that of another vocabulary."""
        return loss / math.log(2) * self.tokens / self.bytes


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of one split, on disk, in shards."""

    shards: list[np.ndarray]  # each [n, T], uint16 or uint32, memory-mapped
    starts: np.ndarray  # the number of sequences before each shard

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Sequences by number. ids: [B]; returns int64 [B, T]."""
        shard_numbers = np.searchsorted(self.starts, ids, side="right") - 1
        sequences = np.empty((len(ids), self.shards[0].shape[1]), np.int64)
        for number in np.unique(shard_numbers):
            rows = shard_numbers == number
            sequences[rows] = self.shards[number][ids[rows] - self.starts[number]]
        return sequences


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The prepared corpus. token_counts: int64 [V], how often each ordinary token stands in the training sequences; 0 for special ones.

    held_out_below: documents whose hash (documents.split_hash) is below are held out; None where a cache from before this was kept does not tell.
    """

    key: str
    folder: Path
    report: Report
    train: Sequences
    held_out: Sequences
    token_counts: np.ndarray
    tokens_per_word: float
    unknown_rate: float
    megabytes: float
    held_out_below: int | None


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.npy"


def open_tokens(folder: Path, key: str, tokenizer: Tokenizer) -> Tokens:
    """What `prepare_tokens` has written. Raises InputError where it is damaged."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, not {FORMAT}")
        report = Report(**manifest["report"])
        if not all(isinstance(number, int) for number in dataclasses.astuple(report)):
            raise ValueError("the report holds no numbers")
        token_counts = load_array(folder / TOKEN_COUNTS, (np.int64,), (tokenizer.get_vocab_size(),))
        train, held_out = (_open_split(folder, split, manifest) for split in SPLITS)
        below = manifest.get("held_out_below")
        if not isinstance(below, int | None):
            raise ValueError(f"held_out_below is {below!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the token cache is damaged ({error}): delete {folder} and start again") from error
    known, unknown = token_counts[N_SPECIAL:].sum(), token_counts[UNK_ID]
    starts_word = np.array([not (tokenizer.id_to_token(i) or "").startswith("##") for i in range(N_SPECIAL, len(token_counts))])
    words = token_counts[N_SPECIAL:][starts_word].sum() + unknown
    token_counts[:N_SPECIAL] = 0
    return Tokens(key, folder, report, train, held_out, token_counts, tokens_per_word=float((known + unknown) / words),
                  unknown_rate=float(unknown / (known + unknown)),
                  megabytes=sum(shard.nbytes for split in (train, held_out) for shard in split.shards) / 1e6, held_out_below=below)


def _open_split(folder: Path, split: str, manifest: dict) -> Sequences:
    shards = []
    for number, n_sequences in enumerate(manifest[split]):
        if n_sequences:
            shards.append(load_array(folder / shard_name(split, number), (np.uint16, np.uint32), (n_sequences, manifest["max_seq_len"]), mmap_mode="r"))
    if not shards:
        raise ValueError(f"there is no shard of {split}")
    return Sequences(shards, np.cumsum([0] + [len(shard) for shard in shards[:-1]]))


def load_array(path: Path, dtypes: tuple[type, ...], shape: tuple[int, ...], mmap_mode: str | None = None) -> np.ndarray:
    """An array that was saved with one of these dtypes and this shape. Raises OSError or ValueError where the file is another's, or damaged."""
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy reads a header as Python, and lets through whatever comes of that
        raise ValueError(f"{path.name}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path.name} holds several arrays")
    if array.dtype not in dtypes or array.shape != shape:
        raise ValueError(f"{path.name} has {array.dtype} of the shape {array.shape}")
    return array
