"""Documents -> sequences of token ids on disk, once, on all cores, in flat memory, resuming after a kill.

First the documents are encoded, a block of them at a time, to files of ids and hashes of the texts. After the last one
the number of documents is known, and so which of them are held out; then the blocks are arranged in sequences, in one
file for each split. What a block holds depends on the documents alone, so the result has the same bytes however often
the work was stopped.
Shapes: D documents of a block, I ids of a block, N sequences, T = max_seq_len.
"""

import collections
import concurrent.futures
import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from microbert.config.constants import Config
from microbert.data.corpus import (
    HELD_OUT_AT_MOST,
    HELD_OUT_SHARE,
    READ_CHARACTERS,
    READ_ROWS,
    Corpus,
    Estimate,
    Position,
    clean,
    split_hash,
)
from microbert.data.fast_encode import Encoder, ranges
from microbert.data.shards import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKEN_COUNTS,
    Report,
    Tokens,
    check_numbers,
    open_tokens,
    split_file,
)
from microbert.data.tokenizer import (
    CLS_ID,
    N_SPECIAL,
    PAD_ID,
    SAMPLE_CHARACTERS,
    SEP_ID,
    SPECIAL_TOKENS,
    UNK_ID,
    alphabet_of,
    largest_alphabet,
    load_tokenizer,
    tokenizer_path,
)
from microbert.errors import InputError
from microbert.runtime.files import (
    fingerprint,
    open_atomic,
    read_json,
    refuse_link,
    remove_stale,
    system_trouble,
    write_atomic,
    write_json,
)
from microbert.runtime.metrics import progress_bar
from microbert.runtime.workers import n_workers, open_pool

BLOCK_ROWS = 100_000
BLOCK_CHARACTERS = 7_500_000
TOKENS_A_MEGABYTE = 240_000  # of English text with a vocabulary of 10,000, for the size estimate
HASHES_AT_A_TIME = 2_000_000  # sorted in memory to count duplicates
UNKNOWN_OF_A_BLOCK, UNKNOWN_SHOWN = 200, 8  # the most frequent unknown characters that are recorded, and named
MANY_UNKNOWN = 0.01  # warn above this share of unknown tokens, or of documents that are left out for them

Result = TypeVar("Result")
_encoder: Encoder  # in the processes of the pool
_starts_word: np.ndarray  # bool [V], True for [UNK] and for ordinary tokens that do not continue a word


def prepare_tokens(corpus: Corpus, tokenizer: Tokenizer, config: Config, check_stop: Callable[[], None]) -> Tokens:
    """The corpus as sequences of tokens in the cache: found there, or written now, by whoever holds the corpus's cache.

    `check_stop` is called between blocks and may raise; what is written stays, and the next call resumes after it.
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
            below = _held_out_below(blocks, corpus, config)
            _lay_out_blocks(blocks, below, tokenizer, config, folder, pool, check_stop)
        print(f"prepared in {time.perf_counter() - begin:.1f} s")
    corpus.remember()
    _remove_blocks(folder)  # also those of a run that was killed just before it would have done so
    tokens = open_tokens(folder, key, tokenizer)
    _print_report(tokens, tokenizer, config)
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
    """The size of the prepared tokens; while they are written, as much again is needed."""
    return estimated_tokens(estimate, config) * np.dtype(_dtype(config)).itemsize / 1e6


def _dtype(config: Config) -> type:
    return np.uint16 if config.vocab_size <= 2**16 else np.uint32


def _announce(corpus: Corpus, config: Config, folder: Path) -> None:
    estimate = corpus.estimate
    size = estimated_megabytes(estimate, config)
    free = shutil.disk_usage(folder).free / 1e6
    print(
        f"preparing {'' if estimate.is_exact else 'about '}{estimate.documents:,} documents, about {estimate.megabytes:,.0f} MB of text: "
        f"about {size:,.0f} MB of tokens in {folder}, and twice that meanwhile ({free / 1e3:,.0f} GB free)"
    )
    if 2 * size > free:
        print(
            "warning: the disk may be too small for that; a smaller max_samples takes less, another cache_dir may have more"
        )


@dataclasses.dataclass(frozen=True)
class _Block:
    """What is recorded of a block beside its file. The counts are those of Report.

    unknown_characters: the most frequent ones. smallest, largest: of the hashes of the documents that are kept.
    end: the position after the block.
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
    def kept(self) -> int:
        """Documents that become sequences."""
        return self.documents - self.unknown - self.unknown_start


def _encode_blocks(
    corpus: Corpus, config: Config, folder: Path, pool: concurrent.futures.Executor, check_stop: Callable[[], None]
) -> list[_Block]:
    """Writes block-NNNNN.npz (hashes uint64 [D], lengths int64 [D], ids [I]) and .json for each block; those that are there stay."""
    blocks = _finished_blocks(folder)
    position = blocks[-1].end if blocks else Position()
    if blocks:
        print(f"going on behind {position.rows:,} rows that were prepared before")
    waiting = (
        pool.submit(_write_block, rows, end, number, config, folder)
        for number, (rows, end) in enumerate(_blocks(corpus, position, check_stop), len(blocks))
    )
    megabytes, begin = 0.0, time.perf_counter()
    with progress_bar(corpus.estimate.documents, position.rows, "preparing", " documents", leave=False) as bar:
        for block in _in_order(waiting, check_stop):
            blocks.append(block)
            megabytes += block.bytes / 1e6
            bar.set_postfix_str(f"{megabytes / (time.perf_counter() - begin):.1f} MB/s", refresh=False)
            bar.update(block.rows)
    return blocks


def _in_order(futures: Iterable[concurrent.futures.Future[Result]], check_stop: Callable[[], None]) -> Iterator[Result]:
    """The results of the futures. Takes a new one only while few are unfinished, so that memory stays flat."""
    waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > n_workers():
            check_stop()
            yield waiting.popleft().result()
    while waiting:
        check_stop()
        yield waiting.popleft().result()


def _finished_blocks(folder: Path) -> list[_Block]:
    """The blocks of an earlier run, up to the first that it did not finish."""
    blocks: list[_Block] = []
    while True:
        path = folder / f"block-{len(blocks):05d}.json"
        try:
            blocks.append(_read_record(path, blocks[-1].end.rows if blocks else 0))
        except FileNotFoundError:
            return blocks
        except (OSError, ValueError, KeyError, TypeError) as error:
            if system_trouble(error):
                raise
            print(f"warning: {path} is damaged ({error}): preparing again from there")
            return blocks


def _read_record(path: Path, rows_before: int) -> _Block:
    """Raises OSError, ValueError, KeyError or TypeError where it is missing or damaged."""
    stored = read_json(path)
    check_numbers({name: value for name, value in stored.items() if name not in ("end", "unknown_characters")})
    check_numbers(stored["end"] | stored["unknown_characters"])
    block = _Block(**{**stored, "end": Position(**stored["end"])})
    if block.end.rows != rows_before + block.rows or block.documents != block.rows - block.empty or block.kept < 0:
        raise ValueError("its numbers do not agree")
    return block


def _blocks(
    corpus: Corpus, start: Position, check_stop: Callable[[], None]
) -> Iterator[tuple[list[str | None], Position]]:
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
    global _encoder, _starts_word
    loaded = load_tokenizer(tokenizer)
    _encoder = Encoder(loaded)
    tokens = map(loaded.id_to_token, range(loaded.get_vocab_size()))
    _starts_word = np.array([not (token or "").startswith("##") for token in tokens])
    _starts_word[[i for i in range(N_SPECIAL) if i != UNK_ID]] = False


def _write_block(rows: list[str | None], end: Position, number: int, config: Config, folder: Path) -> _Block:
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
    kept_ids = ids[ranges(starts[keep], used[keep])].astype(_dtype(config))
    arrays = {"hashes": hashes[keep], "lengths": used[keep], "ids": kept_ids}
    write_atomic(folder / f"block-{number:05d}.npz", lambda file: np.savez(file, **arrays))
    block = _Block(
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
        unknown_characters=dict(_encoder.unknown_characters.most_common(UNKNOWN_OF_A_BLOCK)),
        smallest=int(hashes[keep].min(initial=2**64 - 1)),
        largest=int(hashes[keep].max(initial=0)),
        end=end,
    )
    write_json(folder / f"block-{number:05d}.json", dataclasses.asdict(block))
    return block


def _held_out_below(blocks: list[_Block], corpus: Corpus, config: Config) -> int:
    """Documents whose hash is below it are held out. Raises InputError where that cannot leave a document on either side."""
    documents = sum(block.kept for block in blocks)
    smallest = min((block.smallest for block in blocks), default=0)
    largest = max((block.largest for block in blocks), default=0)
    if documents == 0 or smallest == largest:
        why = (
            "the tokenizer knows no token of any document"
            if documents == 0
            else "at least two different documents are needed, one to train on and one to hold out"
        )
        skipped = _skipped(*(_sum_of(blocks, name) for name in ("empty", "unknown", "unknown_start")), config)
        raise InputError(
            f"{corpus.description}: too little text: {why} ({_sum_of(blocks, 'rows'):,} read, "
            f"{documents:,} used; skipped: {skipped})"
        )
    share = min(HELD_OUT_SHARE, HELD_OUT_AT_MOST / documents)
    return min(max(int(2**64 * share), smallest + 1), largest)


def _sum_of(blocks: list[_Block], name: str) -> int:
    return sum(getattr(block, name) for block in blocks)


def _lay_out_blocks(
    blocks: list[_Block],
    below: int,
    tokenizer: Tokenizer,
    config: Config,
    folder: Path,
    pool: concurrent.futures.Executor,
    check_stop: Callable[[], None],
) -> None:
    """Writes the sequences of both splits, the token counts and, last, the manifest."""
    n_documents, n_ids = np.zeros((2, len(SPLITS), len(blocks)), np.int64)  # of each split in each block
    for number in range(len(blocks)):
        check_stop()
        hashes, lengths = _read_block(folder, number, config, "hashes", "lengths")
        for split, chosen in enumerate(_of_splits(hashes, below)):
            n_documents[split, number], n_ids[split, number] = chosen.sum(), lengths[chosen].sum()
    sizes = zip(n_documents.tolist(), n_ids.tolist())
    parts = zip(*(packed_parts(*of_split, config.max_seq_len) for of_split in sizes))
    vocab_size = tokenizer.get_vocab_size()
    waiting = (
        pool.submit(_lay_out_block, number, parts_of_block, below, config, folder, vocab_size)
        for number, parts_of_block in enumerate(parts)
    )
    counts, n_sequences, n_unknown = np.zeros(vocab_size, np.int64), dict.fromkeys(SPLITS, 0), 0
    with open_atomic(split_file(folder, SPLITS[0])) as train, open_atomic(split_file(folder, SPLITS[1])) as held_out:
        for sequences, unknown, of_block in _in_order(waiting, check_stop):
            for split, file, rows in zip(SPLITS, (train, held_out), sequences):
                file.write(np.ascontiguousarray(rows))
                n_sequences[split] += len(rows)
            n_unknown += unknown
            counts += of_block
    write_atomic(folder / TOKEN_COUNTS, lambda file: np.save(file, counts, allow_pickle=False))
    n_train, n_held_out = n_documents.sum(axis=1).tolist()
    n_distinct = _count_distinct(folder, len(blocks), n_train + n_held_out, config)
    names = [field.name for field in dataclasses.fields(Report) if field.name in _Block.__dataclass_fields__]
    report = Report(
        train=n_train,
        held_out=n_held_out,
        duplicates=n_train + n_held_out - n_distinct,
        unknown_sequences=n_unknown,
        **{name: _sum_of(blocks, name) for name in names},
    )
    characters: Counter[str] = Counter()
    for block in blocks:
        characters.update(block.unknown_characters)
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "max_seq_len": config.max_seq_len,
            "dtype": np.dtype(_dtype(config)).name,
            **n_sequences,
            "held_out_below": below,
            "unknown_characters": dict(characters.most_common(UNKNOWN_SHOWN)),
            "report": dataclasses.asdict(report),
        },
    )


def _of_splits(hashes: np.ndarray, below: int) -> tuple[np.ndarray, np.ndarray]:
    """Which documents each of SPLITS has: bool [D]."""
    is_held_out = hashes < np.uint64(below)
    return ~is_held_out, is_held_out


@dataclasses.dataclass(frozen=True)
class Part:
    """The packed rows of a split that begin in one block, as `tokens` tokens from `skip` after the start of the block.

    blocks: those that hold these tokens. is_first: whether the split's text begins with this block.
    """

    skip: int
    tokens: int
    blocks: list[int]
    is_first: bool


def packed_parts(documents: list[int], ids: list[int], max_seq_len: int) -> list[Part]:
    """For each block the rows that begin in it. They continue in the next blocks, so only a split's last row is padded.

    documents, ids: how many of the split each block holds.
    """
    width = max_seq_len - 2
    ends, total = [], 0
    for of_documents, of_ids in zip(documents, ids):
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
        parts.append(Part(first - start, last - first, blocks, start == 0) if first < end else Part(0, 0, [], False))
    return parts


def _lay_out_block(
    number: int, parts: tuple[Part, ...], below: int, config: Config, folder: Path, vocab_size: int
) -> tuple[list[np.ndarray], int, np.ndarray]:
    """The sequences of both splits, how many without a known token were left out, and counts of training tokens."""
    sequences, n_unknown = [], 0
    for split, part in enumerate(parts):
        if config.packing:
            texts, wanted = [np.zeros(0, _dtype(config))], part.skip + part.tokens
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
    return sequences, n_unknown, np.bincount(sequences[0].reshape(-1), minlength=vocab_size)


def _documents(
    folder: Path, number: int, split: int, below: int, config: Config, tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids and lengths of a split's documents in a block: of the first ones with so many tokens, or of all."""
    hashes, lengths, ids = _read_block(folder, number, config, "hashes", "lengths", "ids")
    chosen = np.flatnonzero(_of_splits(hashes, below)[split])
    if tokens is not None:
        chosen = chosen[: np.searchsorted(np.cumsum(lengths[chosen]), tokens) + 1]
    starts = np.cumsum(lengths) - lengths
    return ids[ranges(starts[chosen], lengths[chosen])], lengths[chosen]


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


def packed_text(ids: np.ndarray, lengths: np.ndarray, is_first: bool) -> np.ndarray:
    """Documents one after another, with [SEP] before each but the first of all. ids: [I], lengths: [D]."""
    return np.insert(ids, np.cumsum(lengths) - lengths, SEP_ID)[int(is_first) :]


def packed_sequences(text: np.ndarray, max_seq_len: int) -> np.ndarray:
    """Running text in rows: [CLS], max_seq_len - 2 tokens, [SEP]. Only the last one is padded. Returns [N, T]."""
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


def _count_distinct(folder: Path, n_blocks: int, documents: int, config: Config) -> int:
    """How many different hashes the blocks hold: those of one range after another, so that memory stays flat."""
    n_ranges = -(-documents // HASHES_AT_A_TIME)
    edges = [number * 2**64 // n_ranges for number in range(n_ranges + 1)]
    distinct = 0
    for first, end in zip(edges, edges[1:]):
        of_range = []
        for number in range(n_blocks):
            [hashes] = _read_block(folder, number, config, "hashes")
            of_range.append(hashes[(hashes >= np.uint64(first)) & (hashes <= np.uint64(end - 1))])
        in_range = np.concatenate(of_range)
        in_range.sort()  # np.unique takes several times as much memory
        distinct += min(1, len(in_range)) + int(np.count_nonzero(in_range[1:] != in_range[:-1]))
    return distinct


def _read_block(folder: Path, number: int, config: Config, *names: str) -> list[np.ndarray]:
    """Raises InputError where the file is damaged, OSError where the system cannot read it."""
    path = folder / f"block-{number:05d}.npz"
    dtypes = {"hashes": np.uint64, "lengths": np.int64, "ids": _dtype(config)}
    try:
        with np.load(path, allow_pickle=False) as block:
            arrays = {name: block[name] for name in dtypes if name in names}
        if any(array.dtype != dtypes[name] or array.ndim != 1 for name, array in arrays.items()):
            raise ValueError("its arrays are not those of a block")
        _, lengths, ids = (arrays.get(name) for name in dtypes)
        if lengths is not None and (lengths.min(initial=1) < 1 or len(lengths) != len(arrays["hashes"])):
            raise ValueError("its arrays do not agree")
        if ids is not None and lengths.sum() != len(ids):
            raise ValueError("its lengths do not agree")
        return list(arrays.values())
    except Exception as error:  # numpy and zipfile let through whatever comes of a damaged file
        if system_trouble(error):
            raise
        raise InputError(f"{path} is damaged ({error}): delete {folder} and start again") from error


def _remove_blocks(folder: Path) -> None:
    for path in folder.glob("block-*"):
        path.unlink()


def _skipped(empty: int, unknown: int, unknown_start: int, config: Config) -> str:
    """Which documents are left out, and why."""
    reasons = (
        (empty, "empty"),
        (unknown, "without one known token"),
        (unknown_start, f"without one in their first {config.max_seq_len - 2:,} tokens"),
    )
    return ", ".join(f"{number:,} {why}" for number, why in reasons if number) or "none"


def _print_report(tokens: Tokens, tokenizer: Tokenizer, config: Config) -> None:
    report = tokens.report
    skipped = _skipped(report.empty, report.unknown, report.unknown_start, config)
    print(
        f"documents: {report.rows:,} read, {report.train:,} to train on, {report.held_out:,} held out; "
        f"skipped: {skipped}; {report.duplicates:,} duplicates kept"
    )
    print(
        f"text: {report.characters / 1e6:,.1f}M characters; vocabulary {len(tokens.token_counts):,}, "
        f"{report.tokens_per_word:.2f} tokens a word, {report.unknown_rate:.3%} unknown"
    )
    dropped = f"; {report.unknown_sequences:,} left out without one known token" if report.unknown_sequences else ""
    print(
        f"tokens: {tokens.token_counts.sum() / 1e6:,.2f}M to train on, in {len(tokens.train):,} sequences of {config.max_seq_len}; "
        f"{len(tokens.held_out):,} sequences held out{dropped} ({tokens.megabytes:,.1f} MB in {tokens.folder})"
    )
    n_unknown = report.unknown + report.unknown_start
    if max(report.unknown_rate, n_unknown / report.documents) > MANY_UNKNOWN:
        print(_unknown_warning(tokens, tokenizer, config))


def _unknown_warning(tokens: Tokens, tokenizer: Tokenizer, config: Config) -> str:
    """How much is unknown, why, and what helps."""
    report, n_known = tokens.report, len(alphabet_of(tokenizer))
    characters = dict(tokens.unknown_characters)
    written = characters.pop(SPECIAL_TOKENS[UNK_ID], 0)
    warning = (
        f"warning: {report.unknown_tokens:,} of {report.tokens:,} tokens are unknown, and "
        f"{report.unknown + report.unknown_start:,} of {report.documents:,} documents are left out for it"
    )
    if characters:
        named = ", ".join(f"{text} (U+{ord(text):04X}, {times:,} times)" for text, times in characters.items())
        warning += f"; words with these characters are unknown: {named}. The tokenizer knows {n_known:,} characters, "
        if n_known >= largest_alphabet(config.vocab_size):
            warning += f"as many as vocab_size = {config.vocab_size:,} has room for: raise it"
        else:
            warning += (
                f"those of its sample, which is at most the first {SAMPLE_CHARACTERS / 1e6:.0f}M characters of "
                "the corpus: it needs more text with the others in it"
            )
    if written:
        warning += f"; {written:,} are [UNK] in the text itself"
    return warning
