"""Documents -> token shards on disk, once, on all cores, in flat memory, going on where a kill stopped it.

First the documents are encoded, a block of them at a time, to files of ids and hashes of the texts. When the last one is read it is known
how many there are, and so which are held out; then each block is laid out in sequences, one shard for each split, and its file goes.
Blocks do not depend on each other and the tokenizer is fixed, so the shards are the same bytes however often the work was stopped.
Shapes: D documents of a block, I ids of a block, N sequences, T = max_seq_len.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .config import Config, InputError
from .documents import HELD_OUT_AT_MOST, HELD_OUT_SHARE, READ_CHARACTERS, READ_ROWS, Corpus, Estimate, Position, clean, split_hash
from .encoder import Encoder, ranges
from .files import fingerprint, read_json, refuse_link, remove_stale, write_atomic, write_json
from .report import progress_bar
from .tokenizer import CLS_ID, N_SPECIAL, PAD_ID, SEP_ID, load_tokenizer, tokenizer_path
from .tokens import FORMAT, MANIFEST, SPLITS, TOKEN_COUNTS, Report, Tokens, open_tokens, shard_name
from .workers import n_workers, open_pool

BLOCK_ROWS = 100_000
BLOCK_CHARACTERS = 7_500_000
TOKENS_A_MEGABYTE = 240_000  # of English text with a vocabulary of 10,000, for the size estimate
HASHES_AT_A_TIME = 2_000_000  # sorted in memory to count duplicates

_encoder: Encoder  # in the processes of the pool


def prepare_tokens(corpus: Corpus, tokenizer: Tokenizer, config: Config, check_stop: Callable[[], None]) -> Tokens:
    """The corpus as token shards in the cache: found there, or written now, by whoever holds the corpus's cache.

    `check_stop` is called between blocks and may raise; what is written stays, and the next call goes on behind it.
    Raises InputError where there is too little text to train on one part and hold out another.
    """
    key, folder = _place(corpus, tokenizer, config)
    refuse_link(folder)
    if not (folder / MANIFEST).exists():
        folder.mkdir(exist_ok=True)
        remove_stale(folder)
        _announce(corpus, config, folder)
        begin = time.perf_counter()
        with open_pool(corpus.estimate.megabytes, _set_encoder, tokenizer_path(corpus, config)) as pool:
            blocks = _encode_blocks(corpus, config, folder, pool, check_stop)
            below = _held_out_below(blocks, corpus)
            _lay_out_blocks(blocks, below, tokenizer, config, folder, pool, check_stop)
        print(f"prepared in {time.perf_counter() - begin:.1f} s")
    corpus.remember()
    _remove_blocks(folder)  # also those of a run that was killed just before it would have done so
    tokens = open_tokens(folder, key, tokenizer)
    _print_report(tokens, config)
    return tokens


def find_tokens(corpus: Corpus, tokenizer: Tokenizer, config: Config) -> Tokens | None:
    """The tokens that an earlier run has prepared from this corpus with these settings."""
    key, folder = _place(corpus, tokenizer, config)
    return open_tokens(folder, key, tokenizer) if (folder / MANIFEST).exists() else None


def _place(corpus: Corpus, tokenizer: Tokenizer, config: Config) -> tuple[str, Path]:
    """The tokens' key, in which everything is that decides them, and their folder."""
    layout = BLOCK_ROWS, BLOCK_CHARACTERS, READ_ROWS, READ_CHARACTERS, HELD_OUT_SHARE, HELD_OUT_AT_MOST
    key = fingerprint(FORMAT, layout, corpus.key, config.seed, tokenizer.to_str(), config.max_seq_len, config.packing)
    return key, corpus.cache_folder(config) / f"tokens-{key}"


def estimated_tokens(estimate: Estimate, config: Config) -> float:
    """Tokens of the corpus as they will lie on disk, padding included."""
    return estimate.megabytes * TOKENS_A_MEGABYTE if config.packing else estimate.documents * config.max_seq_len


def estimated_megabytes(estimate: Estimate, config: Config) -> float:
    """The size of the token shards; while they are written, as much again is needed."""
    return estimated_tokens(estimate, config) * np.dtype(_dtype(config)).itemsize / 1e6


def _dtype(config: Config) -> type:
    return np.uint16 if config.vocab_size <= 2**16 else np.uint32


def _announce(corpus: Corpus, config: Config, folder: Path) -> None:
    estimate = corpus.estimate
    size = estimated_megabytes(estimate, config)
    free = shutil.disk_usage(folder).free / 1e6
    print(f"preparing {'' if estimate.is_exact else 'about '}{estimate.documents:,} documents, about {estimate.megabytes:,.0f} MB of text: "
          f"about {size:,.0f} MB of tokens in {folder}, and twice that meanwhile ({free / 1e3:,.0f} GB free)")
    if 2 * size > free:
        print("warning: the disk may be too small for that; a smaller max_samples takes less, another cache_dir may have more")


@dataclasses.dataclass(frozen=True)
class _Block:
    """What is kept of a block besides its file. smallest, largest: of the documents' hashes. end: the position behind it."""

    rows: int
    empty: int
    documents: int
    without_tokens: int
    characters: int
    bytes: int
    tokens: int
    smallest: int
    largest: int
    end: Position


def _encode_blocks(corpus: Corpus, config: Config, folder: Path, pool: concurrent.futures.Executor, check_stop: Callable[[], None]) -> list[_Block]:
    """Writes block-NNNNN.npz (hashes uint64 [D], lengths int64 [D], ids [I]) and .json for each block; those that are there stay."""
    blocks = _finished_blocks(folder)
    position = blocks[-1].end if blocks else Position()
    if blocks:
        print(f"going on behind {position.rows:,} rows that were prepared before")
    waiting: collections.deque[concurrent.futures.Future[_Block]] = collections.deque()
    megabytes, begin = 0.0, time.perf_counter()
    with progress_bar(corpus.estimate.documents, position.rows, "preparing", " documents", leave=False) as bar:
        def finish_oldest() -> None:
            nonlocal megabytes
            block = waiting.popleft().result()
            blocks.append(block)
            megabytes += block.bytes / 1e6
            bar.set_postfix_str(f"{megabytes / (time.perf_counter() - begin):.1f} MB/s", refresh=False)
            bar.update(block.rows)

        for rows, end in _blocks(corpus, position, check_stop):
            waiting.append(pool.submit(_write_block, rows, end, len(blocks) + len(waiting), config, folder))
            while len(waiting) > n_workers():  # so that no more than these are in memory
                finish_oldest()
        while waiting:
            check_stop()
            finish_oldest()
    return blocks


def _finished_blocks(folder: Path) -> list[_Block]:
    """The blocks of an earlier run, up to the first that it did not finish."""
    blocks = []
    while True:
        try:
            stored = read_json(folder / f"block-{len(blocks):05d}.json")
            blocks.append(_Block(**{**stored, "end": Position(**stored["end"])}))
        except (OSError, ValueError, KeyError, TypeError):
            return blocks


def _blocks(corpus: Corpus, start: Position, check_stop: Callable[[], None]) -> Iterator[tuple[list[str | None], Position]]:
    """Rows up to BLOCK_ROWS or BLOCK_CHARACTERS in all, each time with the position behind them."""
    block, characters = [], 0
    end = start
    for rows, end in corpus.read(start):
        check_stop()
        block += rows
        characters += sum(len(row) for row in rows if row)
        if len(block) >= BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            yield block, end
            block, characters = [], 0
    if block:
        yield block, end


def _set_encoder(tokenizer: Path) -> None:
    """To be called before `_write_block`, in the same process. A path, because starting a process waits for ever if that dies with much to read."""
    global _encoder
    _encoder = Encoder(load_tokenizer(tokenizer))


def _write_block(rows: list[str | None], end: Position, number: int, config: Config, folder: Path) -> _Block:
    texts = [text for text in map(clean, rows) if text]
    hashes = np.array([split_hash(text, config.seed) for text in texts], np.uint64)
    ids, lengths = _encoder.encode(texts)
    has_token = np.zeros(len(texts) + 1, np.int64)
    has_token[1:] = np.cumsum(lengths)
    known = np.concatenate([[0], np.cumsum(ids >= N_SPECIAL)])[has_token]
    keep = np.diff(known) > 0  # [D]
    starts = (has_token[:-1])[keep]
    kept_lengths = lengths[keep] if config.packing else np.minimum(lengths[keep], config.max_seq_len - 2)
    kept_ids = ids[ranges(starts, kept_lengths)].astype(_dtype(config))
    arrays = {"hashes": hashes[keep], "lengths": kept_lengths, "ids": kept_ids}
    write_atomic(folder / f"block-{number:05d}.npz", lambda file: np.savez(file, **arrays))
    block = _Block(len(rows), len(rows) - len(texts), len(texts), int((~keep).sum()), sum(map(len, texts)),
                   sum(len(text.encode()) for text in texts), len(ids), int(hashes[keep].min(initial=2**64 - 1)), int(hashes[keep].max(initial=0)), end)
    write_json(folder / f"block-{number:05d}.json", dataclasses.asdict(block))
    return block


def _held_out_below(blocks: list[_Block], corpus: Corpus) -> int:
    """Documents whose hash is below it are held out. Raises InputError where that cannot leave a document on either side."""
    documents = sum(block.documents - block.without_tokens for block in blocks)
    if documents == 0:
        raise InputError(f"{corpus.description}: too little text: the tokenizer knows no token of any document")
    smallest, largest = min(block.smallest for block in blocks), max(block.largest for block in blocks)
    if smallest == largest:
        raise InputError(f"{corpus.description}: at least two different documents are needed, one to train on and one to hold out")
    share = min(HELD_OUT_SHARE, HELD_OUT_AT_MOST / documents)
    return min(max(int(2**64 * share), smallest + 1), largest)


def _lay_out_blocks(blocks: list[_Block], below: int, tokenizer: Tokenizer, config: Config, folder: Path, pool: concurrent.futures.Executor,
                    check_stop: Callable[[], None]) -> None:
    """Writes the shards, the token counts and, last, the manifest."""
    counts, sequences, n_held_out = np.zeros(tokenizer.get_vocab_size(), np.int64), {split: [] for split in SPLITS}, 0
    laid_out = pool.map(functools.partial(_lay_out_block, below=below, config=config, folder=folder, vocab_size=len(counts)), range(len(blocks)))
    for of_train, of_held_out, held_out, of_block in laid_out:
        check_stop()
        sequences["train"].append(of_train)
        sequences["held_out"].append(of_held_out)
        n_held_out += held_out
        counts += of_block
    write_atomic(folder / TOKEN_COUNTS, lambda file: np.save(file, counts, allow_pickle=False))
    documents = sum(block.documents - block.without_tokens for block in blocks)
    report = Report(rows=sum(block.rows for block in blocks), empty=sum(block.empty for block in blocks),
                    documents=sum(block.documents for block in blocks), without_tokens=sum(block.without_tokens for block in blocks),
                    train=documents - n_held_out, held_out=n_held_out, duplicates=documents - _count_distinct(folder, len(blocks), documents),
                    **{name: sum(getattr(block, name) for block in blocks) for name in ("characters", "bytes", "tokens")})
    write_json(folder / MANIFEST, {"format": FORMAT, "max_seq_len": config.max_seq_len, "held_out_below": below, **sequences, "report": dataclasses.asdict(report)})


def _lay_out_block(number: int, below: int, config: Config, folder: Path, vocab_size: int) -> tuple[int, int, int, np.ndarray]:
    """Returns the sequences of both splits, the documents held out, and the counts of training tokens, int64 [V]."""
    hashes, lengths, ids = _read_block(folder, number, "hashes", "lengths", "ids")
    is_held_out = hashes < np.uint64(below)
    starts = np.cumsum(lengths) - lengths
    layout = packed_sequences if config.packing else truncated_sequences
    shards = [layout(ids[ranges(starts[chosen], lengths[chosen])], lengths[chosen], config.max_seq_len) for chosen in (~is_held_out, is_held_out)]
    for split, shard in zip(SPLITS, shards):
        if len(shard):
            write_atomic(folder / shard_name(split, number), lambda file: np.save(file, shard, allow_pickle=False))
    return len(shards[0]), len(shards[1]), int(is_held_out.sum()), np.bincount(shards[0].reshape(-1), minlength=vocab_size)


def truncated_sequences(ids: np.ndarray, lengths: np.ndarray, max_seq_len: int) -> np.ndarray:
    """One sequence a document: [CLS], its first max_seq_len - 2 tokens, [SEP], padding. ids: [I], lengths: [D]; returns [D, T]."""
    kept = np.minimum(lengths, max_seq_len - 2)
    columns = np.arange(max_seq_len)
    sequences = np.full((len(lengths), max_seq_len), PAD_ID, ids.dtype)
    is_token = (columns >= 1) & (columns <= kept[:, None])
    sequences[is_token] = ids[ranges(np.cumsum(lengths) - lengths, kept)]
    sequences[:, 0] = CLS_ID
    sequences[np.arange(len(lengths)), kept + 1] = SEP_ID
    return sequences


def packed_sequences(ids: np.ndarray, lengths: np.ndarray, max_seq_len: int) -> np.ndarray:
    """Running text: [CLS], max_seq_len - 2 tokens of the documents one after another with [SEP] between, [SEP].

    Only the last sequence is padded. ids: [I], lengths: [D]; returns [N, T].
    """
    text = np.insert(ids, np.cumsum(lengths)[:-1], SEP_ID)
    width = max_seq_len - 2
    n = -(-len(text) // width)
    sequences = np.full((n, max_seq_len), PAD_ID, ids.dtype)
    inner = np.full(n * width, PAD_ID, ids.dtype)
    inner[: len(text)] = text
    sequences[:, 0] = CLS_ID
    sequences[:, 1:-1] = inner.reshape(n, width)
    sequences[:, -1] = SEP_ID
    if n:
        last = len(text) - (n - 1) * width
        sequences[-1, last + 1 :] = PAD_ID
        sequences[-1, last + 1] = SEP_ID
    return sequences


def _count_distinct(folder: Path, n_blocks: int, documents: int) -> int:
    """How many different hashes the blocks hold: those of one range after another, so that memory stays flat."""
    n_ranges = -(-documents // HASHES_AT_A_TIME)
    edges = [number * 2**64 // n_ranges for number in range(n_ranges + 1)]
    distinct = 0
    for first, end in zip(edges, edges[1:]):
        of_range = []
        for number in range(n_blocks):
            [hashes] = _read_block(folder, number, "hashes")
            of_range.append(hashes[(hashes >= np.uint64(first)) & (hashes <= np.uint64(end - 1))])
        in_range = np.concatenate(of_range)
        in_range.sort()  # np.unique takes several times as much memory
        distinct += min(1, len(in_range)) + int(np.count_nonzero(in_range[1:] != in_range[:-1]))
    return distinct


def _read_block(folder: Path, number: int, *names: str) -> list[np.ndarray]:
    """Raises InputError where the file is damaged."""
    path = folder / f"block-{number:05d}.npz"
    try:
        with np.load(path, allow_pickle=False) as block:
            return [block[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}): delete {folder} and start again") from error


def _remove_blocks(folder: Path) -> None:
    for path in folder.glob("block-*"):
        path.unlink()


def _print_report(tokens: Tokens, config: Config) -> None:
    report = tokens.report
    skipped = [f"{number:,} {why}" for number, why in ((report.empty, "empty"), (report.without_tokens, "without one known token")) if number]
    print(f"documents: {report.rows:,} read, {report.train:,} to train on, {report.held_out:,} held out; skipped: {', '.join(skipped) or 'none'}; "
          f"{report.duplicates:,} duplicates kept")
    print(f"text: {report.characters / 1e6:,.1f}M characters; vocabulary {len(tokens.token_counts):,}, {tokens.tokens_per_word:.2f} tokens a word, "
          f"{tokens.unknown_rate:.3%} unknown")
    print(f"tokens: {tokens.token_counts.sum() / 1e6:,.2f}M to train on, in {len(tokens.train):,} sequences of {config.max_seq_len}; "
          f"{len(tokens.held_out):,} sequences held out ({tokens.megabytes:,.1f} MB in {tokens.folder})")
    if tokens.unknown_rate > 0.01:
        print("warning: many words are unknown to the tokenizer, which saw the first part of the corpus alone: a larger vocab_size may help")
