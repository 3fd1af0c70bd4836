"""Files of the user's as a corpus."""

import contextlib
import functools
import time
from pathlib import Path

from .config import Config, InputError, dataset_files
from .dataset_names import COMPRESSIONS, FILE_KINDS, file_kind
from .documents import Corpus, Estimate, Part, clean
from .file_formats import find_text_column, read_rows
from .files import fingerprint, read_json, sha256, write_json

EXPANSION = 2.5  # of compressed text, for the estimate
PARQUET_EXPANSION = 1.6
HASHES = "file_hashes.json"
SETTLED_SECONDS = 2.0  # a file changed more recently may change again within its time stamp's resolution


def open_files(config: Config) -> Corpus:
    """Raises InputError where the first file with rows cannot be read or has no text column; the others are looked at when their turn comes."""
    paths = dataset_files(config)
    for path in paths:
        if file_kind(path) is None:
            raise InputError(f"{path}: unknown kind of file; known are {', '.join(FILE_KINDS)}, also with {', '.join(COMPRESSIONS)} behind")
    sizes = [Path(path).stat().st_size for path in paths]
    column, first = None, ""
    for first in sorted(paths, key=lambda path: file_kind(path) == "text"):  # the first that holds a row, best with columns
        column = find_text_column(first, config.text_column)
        if column is not None:
            break
    if column is None:
        raise InputError(f"{paths[0]} is empty" if len(paths) == 1 else f"{config.dataset}: all {len(paths):,} files are empty")
    texts = [text for text in map(clean, next(read_rows(first, column))) if text]
    parts = [Part(size, functools.partial(read_rows, path, column)) for path, size in zip(paths, sizes)]
    estimate = _estimate(paths, sizes, config.max_samples, sum(len(text.encode()) for text in texts) / max(1, len(texts)))
    hashes = _KnownHashes(Path(config.cache_dir))
    key = fingerprint([hashes.sha256(Path(path)) for path in paths], [file_kind(path) for path in paths], column, config.max_samples)
    described = paths[0] if len(paths) == 1 else f"{len(paths):,} files, {paths[0]} to {paths[-1]}"
    empty = sum(not size for size in sizes)
    return Corpus(described + (f" ({empty} of them empty)" if empty else ""), f"{Path(paths[0]).name.split('.')[0]}-{key}",
                  lambda: parts, estimate, config.max_samples, remember=hashes.save)


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
            with contextlib.suppress(OSError):  # a cache that cannot be written is still a cache
                write_json(self._path, self._read() | self._new)

    def _read(self) -> dict[str, object]:
        try:
            return read_json(self._path)
        except (OSError, ValueError):
            return {}
