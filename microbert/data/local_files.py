"""Your own files as a corpus."""

import contextlib
import dataclasses
import functools
import time
from pathlib import Path

from microbert.config.constants import Config
from microbert.config.dataset_names import (
    COMPRESSIONS,
    KNOWN_KINDS,
    file_kind,
    find_local_files,
    has_extension,
    some_names,
)
from microbert.data.corpus import Corpus, Estimate, Part, clean
from microbert.data.file_formats import describe_column, find_text_column, is_json_object, name_hints, read_rows
from microbert.data.file_kinds import LFS_ADVICE, is_lfs_pointer, is_readable, reading_errors
from microbert.errors import InputError
from microbert.runtime.files import fingerprint, read_json, sha256, write_json

EXPANSION = 2.5  # of compressed text, for the estimate
PARQUET_EXPANSION = 1.6
HASHES = "file_hashes.json"
SETTLED_SECONDS = 2.0  # a file changed more recently may change again within the resolution of its time stamp


@dataclasses.dataclass(frozen=True)
class LocalFiles:
    """paths: files to read, in order. skipped: a line for the user about the other files, "" if there are none."""

    paths: list[str]
    skipped: str


def readable_files(dataset: str, *own_folders: str) -> LocalFiles:
    """Return the files of `find_local_files` that this suite can read.

    Files without an extension are read as text, unless there are tables among the files or their content is binary.
    Raises InputError as `find_local_files` does, for Git LFS pointers and unsupported formats, and if no file is left.
    """
    found, unsupported = find_local_files(dataset, *own_folders)
    for path in found:
        with reading_errors(path):
            if is_lfs_pointer(path):
                raise InputError(f"{path} {LFS_ADVICE}")
        if has_extension(path) and file_kind(path) is None:
            raise InputError(f"{path}: unsupported file format. {KNOWN_KINDS}")
    has_tables = any(file_kind(path) not in (None, "text") for path in found)
    paths = [
        path for path in found if has_extension(path) or not (len(found) > 1 and (has_tables or not is_readable(path)))
    ]
    others = [path for path in found if path not in set(paths)]
    if found and not paths:
        raise InputError(f"{dataset} contains only files of unsupported formats: {some_names(others)}. {KNOWN_KINDS}")
    notes = [
        f"{len(names):,} {what} ({some_names(names)})"
        for names, what in ((unsupported, "of unsupported formats"), (others, "without an extension"))
        if names
    ]
    return LocalFiles(paths, "files skipped: " + ", ".join(notes) if notes else "")


def open_files(config: Config) -> Corpus:
    """Return the files of `dataset` as a corpus.

    Raises InputError if the first file with rows cannot be read or has no text column; other files are checked when
    they are read.
    """
    files = readable_files(config.dataset, config.cache_dir, config.output_dir)
    paths, notes = files.paths, [files.skipped] if files.skipped else []
    sizes = [Path(path).stat().st_size for path in paths]
    first, column = _first_with_rows(paths, config)
    texts = [text for text in map(clean, next(read_rows(first, column))) if text]
    if file_kind(first) in (None, "text") and texts and is_json_object(texts[0]):
        notes.append(
            f"warning: {first} looks like JSON lines, but is read as plain text, one document per line; rename it to "
            ".jsonl to read one of its columns"
        )
    mean_bytes = sum(len(text.encode()) for text in texts) / max(1, len(texts))
    hashes = _KnownHashes(Path(config.cache_dir))
    # by content, so that a renamed file keeps its tokens; of the name, only what decides how the bytes are read
    key = fingerprint([(hashes.sha256(Path(path)), *name_hints(path)) for path in paths], column, config.max_samples)
    described = paths[0] if len(paths) == 1 else f"{len(paths):,} files, {paths[0]} to {paths[-1]}"
    n_empty = sum(not size for size in sizes)
    parts = [Part(size, functools.partial(read_rows, path, column)) for path, size in zip(paths, sizes, strict=True)]
    return Corpus(
        f"{described} ({describe_column(first, column)}{f'; {n_empty:,} of them empty' if n_empty else ''})",
        f"files-{key}",
        lambda: parts,
        _estimate(paths, sizes, config.max_samples, mean_bytes),
        config.max_samples,
        remember=hashes.save,
        notes=notes,
    )


def _first_with_rows(paths: list[str], config: Config) -> tuple[str, str]:
    """Return the first file that holds a row, tables before text files, and its text column."""
    for path in sorted(paths, key=lambda path: file_kind(path) in (None, "text")):
        column = find_text_column(path, config.text_column)
        if column is not None:
            return path, column
    empty = f"{paths[0]} is empty" if len(paths) == 1 else f"{config.dataset}: all {len(paths):,} files are empty"
    raise InputError(f"{empty}; choose files that contain text")


def _estimate(paths: list[str], sizes: list[int], max_samples: int | None, mean_bytes: float) -> Estimate:
    """Estimate the size of the corpus. sizes: of the files, in bytes. mean_bytes: of the first texts."""
    megabytes = 0.0
    for path, size in zip(paths, sizes, strict=True):
        expansion = EXPANSION if path.endswith(COMPRESSIONS) else 1.0
        megabytes += size * (PARQUET_EXPANSION if file_kind(path) == "parquet" else expansion) / 1e6
    documents = max(1, round(megabytes * 1e6 / max(1.0, mean_bytes + 1)))
    if max_samples is not None and max_samples < documents:
        megabytes, documents = megabytes * max_samples / documents, max_samples
    return Estimate(documents, megabytes)


class _KnownHashes:
    """The SHA-256 of files, saved in the cache with device, inode, size and times.

    So a large file is read in full only once, not at every start.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / HASHES
        self._new: dict[str, dict] = {}
        self._known = self._read()

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        file, stamp = f"{stat.st_dev}:{stat.st_ino}", [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        known = self._known.get(file)
        if isinstance(known, dict) and known.get("stamp") == stamp and isinstance(known.get("sha256"), str):
            return known["sha256"]
        is_settled = time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS
        digest = sha256(path)
        if is_settled:
            self._new[file] = {"stamp": stamp, "sha256": digest}
        return digest

    def save(self) -> None:
        if self._new:
            with contextlib.suppress(OSError):  # a read-only cache only costs time
                write_json(self._path, self._read() | self._new)

    def _read(self) -> dict[str, object]:
        try:
            return read_json(self._path)
        except (OSError, ValueError):
            return {}
