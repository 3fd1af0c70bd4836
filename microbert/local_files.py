"""Files of the user's -- txt, jsonl, csv, parquet, compressed or not -- as a corpus, read through `datasets`."""

import glob
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from .config import COMPRESSIONS, FILE_KINDS, Config, InputError, dataset_files, file_kind
from .documents import READ_ROWS, Corpus, Estimate, Part, choose_text_column, text_rows
from .files import fingerprint, read_json, sha256, write_json

EXPANSION = 2.5  # of compressed text, for the estimate
PARQUET_EXPANSION = 1.6
HASHES = "file_hashes.json"
SETTLED_SECONDS = 2.0  # a file changed more recently may change again within its time stamp's resolution


def open_files(config: Config) -> Corpus:
    """Raises InputError where the first file cannot be read or has no text column; the others are looked at when their turn comes."""
    paths = dataset_files(config.dataset)
    for path in paths:
        if file_kind(path) is None:
            raise InputError(f"{path}: unknown kind of file; known are {', '.join(FILE_KINDS)}, also with {', '.join(COMPRESSIONS)} behind")
    sizes = [Path(path).stat().st_size for path in paths]
    if not any(sizes):
        raise InputError(f"{paths[0]} is empty" if len(paths) == 1 else f"{config.dataset}: all {len(paths)} files are empty")
    first = next(path for path, size in zip(paths, sizes) if size)
    head = next(read_tables(first, 0), None)
    if head is None:
        raise InputError(f"{first} holds no rows")
    column = choose_text_column(head, config.text_column, first)
    texts = [text for text in text_rows(head, column, first) if text]

    def part(path: str, size: int) -> Part:
        def read(row: int) -> Iterator[list[str | None]]:
            if size:
                for table in read_tables(path, row):
                    yield text_rows(table, column if file_kind(path) != "text" else "text", path)

        return Part(size, read)

    estimate = _estimate(paths, sizes, config.max_samples, sum(len(text.encode()) for text in texts) / max(1, len(texts)))
    hashes = _KnownHashes(Path(config.cache_dir))
    key = fingerprint([hashes.sha256(Path(path)) for path in paths], [file_kind(path) for path in paths], column, config.max_samples)
    described = paths[0] if len(paths) == 1 else f"{len(paths):,} files, {paths[0]} to {paths[-1]}"
    empty = sum(not size for size in sizes)
    return Corpus(described + (f" ({empty} of them empty)" if empty else ""), f"{Path(paths[0]).name.split('.')[0]}-{key}",
                  lambda: [part(path, size) for path, size in zip(paths, sizes)], estimate, config.max_samples, remember=hashes.save)


def _estimate(paths: list[str], sizes: list[int], max_samples: int | None, bytes_a_document: float) -> Estimate:
    """From the files' sizes and the length of the first texts."""
    megabytes = 0.0
    for path, size in zip(paths, sizes):
        expansion = PARQUET_EXPANSION if file_kind(path) == "parquet" else EXPANSION if path.endswith(COMPRESSIONS) else 1.0
        megabytes += size * expansion / 1e6
    documents = max(1, round(megabytes * 1e6 / max(1.0, bytes_a_document + 1)))
    if max_samples is not None and max_samples < documents:
        megabytes, documents = megabytes * max_samples / documents, max_samples
    return Estimate(documents, megabytes)


class _KnownHashes:
    """The SHA-256 of files, kept in the cache beside size, times and inode, so that large files are not read through at every start."""

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / HASHES
        self._new: dict[str, dict] = {}
        self._known = self._read()

    def sha256(self, path: Path) -> str:
        stat, name = path.stat(), str(path.resolve())
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = self._known.get(name)
        if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
            return entry["sha256"]
        is_settled = time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS
        entry = {"stamp": stamp, "sha256": sha256(path)}
        if is_settled:
            self._new[name] = entry
        return entry["sha256"]

    def save(self) -> None:
        if self._new:
            write_json(self._path, self._read() | self._new)

    def _read(self) -> dict[str, object]:
        try:
            return read_json(self._path)
        except (OSError, ValueError):
            return {}


def read_tables(path: str, row: int) -> Iterator[pa.Table]:
    """The file's rows from `row` on, some at a time, through `datasets`, which streams the file and undoes compression."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise it tells the Hub of every local file that it opens
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, the error below says
    kind = file_kind(path)
    try:
        rows = datasets.load_dataset(kind, data_files=[glob.escape(path)], split="train", streaming=True).with_format("arrow")
        yield from (rows.skip(row) if row else rows).iter(batch_size=READ_ROWS)
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
