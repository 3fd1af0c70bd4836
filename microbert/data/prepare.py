"""Prepare a corpus: train its tokenizer and write its documents to disk as sequences of token ids.

Preparation uses all cores and bounded memory, and resumes after a kill. First, documents are encoded in blocks. Then
their number is known, which determines the documents to hold out, and the blocks are arranged in sequences, one file
per split. The contents of a block depend on the documents alone, so the result is bitwise identical however often the
work is interrupted.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from microbert.config.constants import Config
from microbert.data.arrange import DocumentsPart, PackedPart, arrange_block, packed_parts, split_masks
from microbert.data.blocks import (
    Block,
    count_distinct,
    finished_blocks,
    read_block,
    remove_blocks,
    set_encoder,
    token_dtype,
    write_block,
)
from microbert.data.corpus import (
    HELD_OUT_AT_MOST,
    HELD_OUT_SHARE,
    READ_CHARACTERS,
    READ_ROWS,
    Corpus,
    Estimate,
    Position,
)
from microbert.data.corpus_counts import CorpusCounts
from microbert.data.corpus_report import corpus_report, preparation_plan, skipped_documents
from microbert.data.pieces import LONGEST_PART, MOST_WASTE, PLANS
from microbert.data.row_lengths import DRAWN_SHARES, TEXT_OF_ROW, row_lengths
from microbert.data.shards import (
    FORMAT,
    HELD_OUT_DOCUMENTS,
    LONGEST_ROW,
    MANIFEST,
    PIECE_COUNTS,
    PIECES,
    SPLITS,
    TOKEN_COUNTS,
    Tokens,
    open_tokens,
    split_file,
)
from microbert.data.sources import lock_cache, open_corpus
from microbert.data.tokenizer import SAMPLE_CHARACTERS, get_tokenizer, tokenizer_path
from microbert.errors import InputError
from microbert.runtime.files import fingerprint, open_atomic, refuse_link, remove_stale, write_atomic, write_json
from microbert.runtime.metrics import progress_bar
from microbert.runtime.run import Run
from microbert.runtime.waiting import never_stop
from microbert.runtime.workers import n_workers, open_pool

BLOCK_ROWS = 100_000
BLOCK_CHARACTERS = 7_500_000
TOKENS_A_MEGABYTE = 240_000  # of English text with a vocabulary of 10,000, for the size estimate
UNKNOWN_SHOWN = 8  # the most frequent unknown characters that the manifest lists

Result = TypeVar("Result")


def prepare_corpus(run: Run) -> tuple[Corpus, Tokenizer, Tokens]:
    """Open the corpus of a run, prepare its tokenizer and tokens or find them in the cache, and print its counts.

    On each machine, the first process prepares while the others wait, then they use its cache.
    Raises InputError if the dataset cannot be read or has too little text, and Stopped after a signal. The next call
    resumes.
    """
    with run.world.local_rank_0_first("tokens", run.check_stop):
        return _prepare(run.config, run.check_stop, print)


def prepare_quietly(config: Config) -> tuple[Corpus, Tokenizer, Tokens]:
    """Do the same as `prepare_corpus` in one process, without a run and without printing its counts."""
    return _prepare(config, never_stop, lambda text: None)


def _prepare(
    config: Config, check_stop: Callable[[], None], show: Callable[[str], None]
) -> tuple[Corpus, Tokenizer, Tokens]:
    """Call `show` with each line for the user."""
    corpus = open_corpus(config, check_stop)
    show(corpus.summary)
    with lock_cache(corpus, config, check_stop):
        if not tokenizer_path(corpus, config).exists():
            show(f"tokenizer: reading up to {SAMPLE_CHARACTERS / 1e6:.0f}M characters, then training WordPiece ...")
        tokenizer = get_tokenizer(corpus, config, check_stop)
        _, folder = _key_and_folder(corpus, tokenizer, config)
        refuse_link(folder)
        is_new = not (folder / MANIFEST).exists()
        if is_new:
            show(preparation_plan(corpus.estimate, estimated_megabytes(corpus.estimate, config), folder))
            blocks, damage = finished_blocks(folder)
            if damage:
                show(f"warning: {damage}")
            if blocks:
                show(f"resuming after {blocks[-1].end.rows:,} rows that an earlier run encoded")
        start = time.perf_counter()
        tokens = prepare_tokens(corpus, tokenizer, config, check_stop)
        if is_new:
            show(f"prepared in {time.perf_counter() - start:.1f} s")
    show(corpus_report(tokens, tokenizer, config))
    return corpus, tokenizer, tokens


def prepare_tokens(
    corpus: Corpus, tokenizer: Tokenizer, config: Config, check_stop: Callable[[], None] = never_stop
) -> Tokens:
    """Open the tokens of the corpus in the cache, or write them. The caller holds the lock of the corpus's cache.

    check_stop: called between blocks; it may raise. Finished blocks remain, and the next call resumes after them.
    Raises InputError if there is too little text to train on one part and hold out another.
    """
    key, folder = _key_and_folder(corpus, tokenizer, config)
    refuse_link(folder)
    if not (folder / MANIFEST).exists():
        folder.mkdir(exist_ok=True)
        remove_stale(folder)
        with open_pool(corpus.estimate.megabytes, set_encoder, tokenizer_path(corpus, config)) as pool:
            blocks = _encode_blocks(corpus, config, folder, pool, check_stop)
            below = _held_out_below(blocks, corpus, config)
            _arrange_blocks(blocks, below, tokenizer.get_vocab_size(), config, folder, pool, check_stop)
    corpus.remember()
    remove_blocks(folder)  # also those of a run that was killed just before it removed them
    return open_tokens(folder, key, tokenizer)


def find_tokens(corpus: Corpus, tokenizer: Tokenizer, config: Config) -> Tokens | None:
    """Return the cached tokens of this corpus and configuration, or None if they are not prepared yet."""
    key, folder = _key_and_folder(corpus, tokenizer, config)
    return open_tokens(folder, key, tokenizer) if (folder / MANIFEST).exists() else None


def _key_and_folder(corpus: Corpus, tokenizer: Tokenizer, config: Config) -> tuple[str, Path]:
    """Return the key of the tokens, which contains everything that determines them, and their folder."""
    layout = BLOCK_ROWS, BLOCK_CHARACTERS, READ_ROWS, READ_CHARACTERS, HELD_OUT_SHARE, HELD_OUT_AT_MOST, LONGEST_ROW
    rows = (row_lengths(config), DRAWN_SHARES, PLANS, MOST_WASTE, LONGEST_PART) if config.rows == "documents" else ()
    of_constants = config.seed, tokenizer.to_str(), config.max_seq_len, config.packing
    key = fingerprint(FORMAT, layout, corpus.key, *of_constants, *rows)
    return key, corpus.cache_folder(config) / f"tokens-{key}"


def estimated_tokens(estimate: Estimate, config: Config) -> float:
    """Return the estimated number of tokens on disk, including padding."""
    return estimate.megabytes * TOKENS_A_MEGABYTE if config.packing else estimate.documents * config.max_seq_len


def estimated_megabytes(estimate: Estimate, config: Config) -> float:
    """Return the estimated size of the prepared tokens in MB. Preparing them needs twice that."""
    held_out_documents = min(HELD_OUT_SHARE * estimate.documents, HELD_OUT_AT_MOST)
    n_tokens = estimated_tokens(estimate, config)
    n_pieces = PLANS * n_tokens / TEXT_OF_ROW if config.rows == "documents" else 0.0
    n_ids = n_tokens + held_out_documents * (LONGEST_ROW - 2)
    return (n_ids * np.dtype(token_dtype(config)).itemsize + n_pieces * np.dtype(np.uint64).itemsize) / 1e6


def _encode_blocks(
    corpus: Corpus, config: Config, folder: Path, pool: concurrent.futures.Executor, check_stop: Callable[[], None]
) -> list[Block]:
    """Encode the documents that no finished block contains, and return all blocks."""
    blocks, _ = finished_blocks(folder)
    position = blocks[-1].end if blocks else Position()
    waiting = (
        pool.submit(write_block, rows, end, number, config, folder)
        for number, (rows, end) in enumerate(_rows_of_blocks(corpus, position, check_stop), len(blocks))
    )
    megabytes, start = 0.0, time.perf_counter()
    with progress_bar(corpus.estimate.documents, position.rows, "preparing", " documents", leave=False) as bar:
        for block in _in_order(waiting, check_stop):
            blocks.append(block)
            megabytes += block.bytes / 1e6
            bar.set_postfix_str(f"{megabytes / (time.perf_counter() - start):.1f} MB/s", refresh=False)
            bar.update(block.rows)
    return blocks


def _rows_of_blocks(
    corpus: Corpus, start: Position, check_stop: Callable[[], None]
) -> Iterator[tuple[list[str | None], Position]]:
    """Yield the rows of each block, up to BLOCK_ROWS or BLOCK_CHARACTERS, and the position after them."""
    block: list[str | None] = []
    characters, end = 0, start
    for rows, end in corpus.read(start):
        check_stop()
        block += rows
        characters += sum(len(row) for row in rows if row)
        if len(block) >= BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            yield block, end
            block, characters = [], 0
    if block:
        yield block, end


def _in_order(futures: Iterable[concurrent.futures.Future[Result]], check_stop: Callable[[], None]) -> Iterator[Result]:
    """Yield the results of the futures in order. Take few at a time, so that memory is bounded."""
    waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > n_workers():
            check_stop()
            yield waiting.popleft().result()
    while waiting:
        check_stop()
        yield waiting.popleft().result()


def _held_out_below(blocks: list[Block], corpus: Corpus, config: Config) -> int:
    """Return the number below which the hash of a document holds it out.

    Raises InputError if no number leaves a document in both splits.
    """
    documents = sum(block.used for block in blocks)
    smallest = min((block.smallest for block in blocks), default=0)
    largest = max((block.largest for block in blocks), default=0)
    if documents == 0 or smallest == largest:
        why = "no document contains a token that the tokenizer knows"
        if documents:
            why = "at least two different documents are required, one for training and one to hold out"
        rows, empty, unknown, unknown_start = (
            _sum_over(blocks, name) for name in ("rows", "empty", "unknown", "unknown_start")
        )
        raise InputError(
            f"{corpus.description}: too little text: {why} ({rows:,} read, {documents:,} used; "
            f"skipped: {skipped_documents(empty, unknown, unknown_start, config)})"
        )
    share = min(HELD_OUT_SHARE, HELD_OUT_AT_MOST / documents)
    return min(max(int(2**64 * share), smallest + 1), largest)


def _sum_over(blocks: list[Block], name: str) -> int:
    return sum(getattr(block, name) for block in blocks)


def _arrange_blocks(
    blocks: list[Block],
    below: int,
    vocab_size: int,
    config: Config,
    folder: Path,
    pool: concurrent.futures.Executor,
    check_stop: Callable[[], None],
) -> None:
    """Write the sequences of both splits, the token counts and, last, the manifest."""
    n_documents, n_ids = np.zeros((2, len(SPLITS), len(blocks)), np.int64)  # of each split in each block
    for number in range(len(blocks)):
        check_stop()
        hashes, lengths = read_block(folder, number, config, "hashes", "lengths")
        for split, chosen in enumerate(split_masks(hashes, below)):
            n_documents[split, number], n_ids[split, number] = chosen.sum(), lengths[chosen].sum()
    waiting = (
        pool.submit(arrange_block, number, parts_of_block, below, config, folder, vocab_size)
        for number, parts_of_block in enumerate(_parts_of_blocks(n_documents, n_ids, config))
    )
    token_counts, n_sequences, n_unknown = np.zeros(vocab_size, np.int64), dict.fromkeys(SPLITS, 0), 0
    piece_counts: list[np.ndarray] = []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_atomic(split_file(folder, split))) for split in SPLITS]
        documents = stack.enter_context(open_atomic(folder / HELD_OUT_DOCUMENTS))
        pieces = stack.enter_context(open_atomic(folder / PIECES)) if config.rows == "documents" else None
        for of_block in _in_order(waiting, check_stop):
            for name, file, rows in zip(SPLITS, files, of_block.sequences, strict=True):
                file.write(np.ascontiguousarray(rows).data)
                n_sequences[name] += len(rows)
            documents.write(of_block.held_out_documents.data)
            if pieces is not None:
                pieces.write(of_block.pieces.data)
                piece_counts.append(of_block.piece_counts)
            n_unknown += of_block.n_unknown
            token_counts += of_block.token_counts
    write_atomic(folder / TOKEN_COUNTS, lambda file: np.save(file, token_counts, allow_pickle=False))
    if piece_counts:
        write_atomic(folder / PIECE_COUNTS, lambda file: np.save(file, np.stack(piece_counts), allow_pickle=False))
    n_train, n_held_out = n_documents.sum(axis=1).tolist()
    n_distinct = count_distinct(folder, len(blocks), n_train + n_held_out, config)
    summed = [field.name for field in dataclasses.fields(CorpusCounts) if field.name in Block.__dataclass_fields__]
    counts = CorpusCounts(
        train=n_train,
        held_out=n_held_out,
        duplicates=n_train + n_held_out - n_distinct,
        unknown_sequences=n_unknown,
        **{name: _sum_over(blocks, name) for name in summed},
    )
    _write_manifest(blocks, below, n_sequences, counts, config, folder)


def _parts_of_blocks(
    n_documents: np.ndarray, n_ids: np.ndarray, config: Config
) -> Iterator[tuple[PackedPart | DocumentsPart, ...]]:
    """Yield for each block what `arrange_block` makes of its training and of its held-out documents.

    n_documents, n_ids: of each of SPLITS in each block.
    """
    of_splits: list[Sequence[PackedPart | DocumentsPart]] = [
        packed_parts(*sizes, config.max_seq_len) for sizes in zip(n_documents.tolist(), n_ids.tolist(), strict=True)
    ]
    if config.rows == "documents":
        before = ((of_train.cumsum() - of_train).tolist() for of_train in (n_documents[0], n_ids[0]))
        of_splits[0] = [DocumentsPart(*numbers) for numbers in zip(*before, strict=True)]
    yield from zip(*of_splits, strict=True)


def _write_manifest(
    blocks: list[Block], below: int, n_sequences: dict[str, int], counts: CorpusCounts, config: Config, folder: Path
) -> None:
    """Write the manifest, which marks the tokens as complete."""
    characters: Counter[str] = Counter()
    for block in blocks:
        characters.update(block.unknown_characters)
    manifest = {
        "format": FORMAT,
        "max_seq_len": config.max_seq_len,
        "dtype": np.dtype(token_dtype(config)).name,
        **n_sequences,
        "held_out_below": below,
        "unknown_characters": dict(characters.most_common(UNKNOWN_SHOWN)),
        "report": dataclasses.asdict(counts),
    }
    if config.rows == "documents":
        manifest |= {"row_lengths": row_lengths(config), "blocks": len(blocks)}
    write_json(folder / MANIFEST, manifest)
