"""Documents -> fingerprinted token shards on disk: memory-mapped, resumable, flat memory.

A shard holds the sequences of one block of documents, one row each, padded to max_seq_len. Blocks do not depend on each
other, so a preparation that was killed goes on after the last whole block, and comes to the same bytes.
Shapes: N sequences, T = max_seq_len, V = vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from .config import Config, InputError
from .corpus import Corpus, Survey, clean, split_hash
from .files import fingerprint, read_json, remove_stale, write_atomic, write_json
from .tokenizer import CLS_ID, N_SPECIAL, PAD_ID, SEP_ID, UNK_ID

FORMAT = 1  # raise it whenever the same input would give other shards
BLOCK_ROWS = 10_000
BLOCK_CHARACTERS = 16_000_000
ENCODE_ROWS = 1_000  # documents encoded at a time: the library's result takes some 100 bytes a token
SPLITS = ("train", "held_out")


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
    """The prepared corpus. token_counts: int64 [V], how often each ordinary token stands in the training sequences; 0 for special ones."""

    key: str
    train: Sequences
    held_out: Sequences
    token_counts: np.ndarray
    tokens_per_word: float
    unknown_rate: float
    without_tokens: int  # documents left out because no known token is in them
    megabytes: float


def prepare_tokens(corpus: Corpus, survey: Survey, tokenizer: Tokenizer, config: Config, check_stop: Callable[[], None]) -> Tokens:
    """The corpus as token shards in the cache: found there, or written now.

    `check_stop` is called between blocks and may raise; what is written stays, and the next call goes on behind it.
    """
    key = fingerprint(FORMAT, corpus.key, survey.held_out_below, config.seed, tokenizer.to_str(), config.max_seq_len, config.packing)
    folder = corpus.cache_folder(config) / f"tokens-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0.5)
        except filelock.Timeout:
            check_stop()  # another run is preparing the same tokens: wait, then use them
    try:
        if not (folder / "manifest.json").exists():
            _write_shards(corpus, survey, tokenizer, config, folder, check_stop)
    finally:
        lock.release()
    tokens = _open(folder, key, tokenizer)
    print(f"tokens: {len(tokens.train):,} sequences of {config.max_seq_len} to train on, {len(tokens.held_out):,} held out "
          f"({tokens.megabytes:.1f} MB in {folder})")
    print(f"vocabulary: {tokenizer.get_vocab_size():,} tokens, {tokens.tokens_per_word:.2f} tokens a word, "
          f"{tokens.unknown_rate:.3%} unknown")
    if tokens.without_tokens:
        print(f"left out: {tokens.without_tokens:,} documents without one known token")
    return tokens


def _write_shards(corpus: Corpus, survey: Survey, tokenizer: Tokenizer, config: Config, folder: Path,
                  check_stop: Callable[[], None]) -> None:
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    remove_stale(folder)
    blocks = []
    rows = corpus.rows()
    with tqdm(total=survey.rows, unit=" documents", desc="tokens", leave=False, mininterval=0.5) as bar:
        while True:
            name = f"block-{len(blocks):05d}.json"
            if (folder / name).exists():  # written before a stop: pass over its rows
                block = read_json(folder / name)
                for _ in range(block["rows"]):
                    next(rows)
            else:
                check_stop()
                texts = list(_next_block(rows))
                if not texts:
                    break
                block = _write_block(texts, len(blocks), tokenizer, survey, config, folder, dtype)
                write_json(folder / name, block)
            bar.update(block["rows"])
            blocks.append(block)

    token_counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for number in range(len(blocks)):
        shard = np.load(folder / f"train-{number:05d}.npy", mmap_mode="r", allow_pickle=False)
        token_counts += np.bincount(shard.reshape(-1), minlength=len(token_counts))
    write_atomic(folder / "token_counts.npy", lambda file: np.save(file, token_counts, allow_pickle=False))
    write_json(folder / "manifest.json", {"format": FORMAT, "max_seq_len": config.max_seq_len, "blocks": blocks})


def _next_block(rows: Iterator[str | None]) -> Iterator[str]:
    """The next rows, cleaned ("" for an empty one), up to BLOCK_ROWS of them or BLOCK_CHARACTERS in all."""
    characters = 0
    for n, row in enumerate(rows, 1):
        text = clean(row)
        characters += len(text)
        yield text
        if n == BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            return


def _write_block(texts: list[str], number: int, tokenizer: Tokenizer, survey: Survey, config: Config, folder: Path,
                 dtype: type) -> dict:
    held_out = [text for text in texts if text and split_hash(text, config.seed) < survey.held_out_below]
    train = [text for text in texts if text and split_hash(text, config.seed) >= survey.held_out_below]
    block = {"rows": len(texts), "without_tokens": 0}
    for split, of_split in zip(SPLITS, (train, held_out)):
        encoded = [ids for ids in _encode(of_split, tokenizer) if len(ids) and (ids >= N_SPECIAL).any()]
        block["without_tokens"] += len(of_split) - len(encoded)
        sequences = (packed_sequences if config.packing else truncated_sequences)(encoded, config.max_seq_len).astype(dtype)
        write_atomic(folder / f"{split}-{number:05d}.npy", lambda file: np.save(file, sequences, allow_pickle=False))
        block[split] = len(sequences)
    return block


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    for start in range(0, len(texts), ENCODE_ROWS):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + ENCODE_ROWS], add_special_tokens=False):
            yield np.array(encoding.ids, np.int64)


def truncated_sequences(encoded: list[np.ndarray], max_seq_len: int) -> np.ndarray:
    """One sequence a document: [CLS], its first max_seq_len - 2 tokens, [SEP], padding. Returns int64 [N, T]."""
    sequences = np.full((len(encoded), max_seq_len), PAD_ID, np.int64)
    sequences[:, 0] = CLS_ID
    for row, ids in zip(sequences, encoded):
        n = min(len(ids), max_seq_len - 2)
        row[1 : n + 1] = ids[:n]
        row[n + 1] = SEP_ID
    return sequences


def packed_sequences(encoded: list[np.ndarray], max_seq_len: int) -> np.ndarray:
    """Running text: [CLS], max_seq_len - 2 tokens of the documents one after another with [SEP] between, [SEP].

    Only the last sequence is padded. Returns int64 [N, T].
    """
    if not encoded:
        return np.zeros((0, max_seq_len), np.int64)
    text = np.concatenate([part for ids in encoded for part in (ids, [SEP_ID])])[:-1]
    width = max_seq_len - 2
    n = -(-len(text) // width)
    sequences = np.full((n, max_seq_len), PAD_ID, np.int64)
    sequences[:, 0] = CLS_ID
    inner = np.full(n * width, PAD_ID, np.int64)
    inner[: len(text)] = text
    sequences[:, 1:-1] = inner.reshape(n, width)
    sequences[:, -1] = SEP_ID
    last = len(text) - (n - 1) * width
    sequences[-1, last + 1 :] = PAD_ID
    sequences[-1, last + 1] = SEP_ID
    return sequences


def _open(folder: Path, key: str, tokenizer: Tokenizer) -> Tokens:
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, not {FORMAT}")
        token_counts = np.load(folder / "token_counts.npy", allow_pickle=False)
        splits = [_open_split(folder, split, manifest) for split in SPLITS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the token cache is damaged ({error}): delete {folder} and start again") from error
    train, held_out = splits
    if not len(train) or not len(held_out):
        raise InputError("too little text: after tokenisation there is nothing to train on or nothing held out")
    known, unknown = token_counts[N_SPECIAL:].sum(), token_counts[UNK_ID]
    starts_word = np.array([not (tokenizer.id_to_token(i) or "").startswith("##") for i in range(N_SPECIAL, len(token_counts))])
    words = token_counts[N_SPECIAL:][starts_word].sum() + unknown
    token_counts[:N_SPECIAL] = 0
    return Tokens(key, train, held_out, token_counts, tokens_per_word=float((known + unknown) / words),
                  unknown_rate=float(unknown / (known + unknown)), without_tokens=sum(block["without_tokens"] for block in manifest["blocks"]),
                  megabytes=sum(shard.nbytes for split in splits for shard in split.shards) / 1e6)


def _open_split(folder: Path, split: str, manifest: dict) -> Sequences:
    shards = []
    for number, block in enumerate(manifest["blocks"]):
        shard = np.load(folder / f"{split}-{number:05d}.npy", mmap_mode="r" if block[split] else None, allow_pickle=False)
        if shard.shape != (block[split], manifest["max_seq_len"]):
            raise ValueError(f"{split}-{number:05d}.npy has the shape {shard.shape}")
        shards.append(shard)
    return Sequences(shards, np.cumsum([0] + [len(shard) for shard in shards[:-1]]))
