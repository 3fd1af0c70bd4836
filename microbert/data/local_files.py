"""Files of the user's as a corpus."""

import contextlib
import dataclasses
import functools
import time
from pathlib import Path

from microbert.config.constants import Config
from microbert.config.dataset_names import COMPRESSIONS, KNOWN_KINDS, file_kind, find_files, has_ending, some_names
from microbert.data.corpus import Corpus, Estimate, Part, clean
from microbert.data.file_formats import describe_column, find_text_column, is_json_object, read_rows, reading_of
from microbert.data.file_kinds import errors_of_reading, is_pointer, is_readable
from microbert.errors import InputError
from microbert.runtime.files import fingerprint, read_json, sha256, write_json

EXPANSION = 2.5  # of compressed text, for the estimate
PARQUET_EXPANSION = 1.6
HASHES = "file_hashes.json"
SETTLED_SECONDS = 2.0  # a file changed more recently may change again within its time stamp's resolution


@dataclasses.dataclass(frozen=True)
class LocalFiles:
    """Files that can be read, in their order.

    left_out: what is not read of the folders among them, in words for people; "" for nothing.
    """

    paths: list[str]
    left_out: str


def readable_files(dataset: str, *own_folders: str) -> LocalFiles:
    """The files that `dataset` names, as `find_files` finds them, without those that are no text.

    Files without an ending are read as text, unless there are tables beside them. Raises InputError as `find_files`
    does, and for Git LFS pointers, for an unknown ending, and where no file is left.
    """
    found, unknown = find_files(dataset, *own_folders)
    for path in found:
        with errors_of_reading(path):
            if is_pointer(path):
                raise InputError(
                    f"{path} is a Git LFS pointer, not the file that it stands for: "
                    "run git lfs pull where it comes from"
                )
        if has_ending(path) and file_kind(path) is None:
            raise InputError(f"{path}: unknown kind of file. {KNOWN_KINDS}")
    has_tables = any(file_kind(path) not in (None, "text") for path in found)
    paths = [
        path for path in found if has_ending(path) or not (len(found) > 1 and (has_tables or not is_readable(path)))
    ]
    without = [path for path in found if path not in set(paths)]
    if found and not paths:
        raise InputError(f"{dataset} holds no file of a known kind: {some_names(without)}. {KNOWN_KINDS}")
    notes = [
        f"{len(names):,} {what} ({some_names(names)})"
        for names, what in ((unknown, "of an unknown kind"), (without, "without an ending"))
        if names
    ]
    return LocalFiles(paths, "files left out: " + ", ".join(notes) if notes else "")


def open_files(config: Config) -> Corpus:
    """Raises InputError where the first file with rows cannot be read or has no text column; the others are looked
    at when their turn comes."""
    files = readable_files(config.dataset, config.cache_dir, config.output_dir)
    paths = files.paths
    if files.left_out:
        print(files.left_out)
    sizes = [Path(path).stat().st_size for path in paths]
    column, first = None, ""
    for first in sorted(
        paths, key=lambda path: file_kind(path) in (None, "text")
    ):  # the first that holds a row, best with columns
        column = find_text_column(first, config.text_column)
        if column is not None:
            break
    if column is None:
        raise InputError(
            f"{paths[0]} is empty" if len(paths) == 1 else f"{config.dataset}: all {len(paths):,} files are empty"
        )
    texts = [text for text in map(clean, next(read_rows(first, column))) if text]
    if file_kind(first) in (None, "text") and texts and is_json_object(texts[0]):
        print(
            f"warning: {first} looks like JSON lines: named .jsonl, one of its columns is read instead of whole lines"
        )
    parts = [Part(size, functools.partial(read_rows, path, column)) for path, size in zip(paths, sizes)]
    estimate = _estimate(
        paths, sizes, config.max_samples, sum(len(text.encode()) for text in texts) / max(1, len(texts))
    )
    hashes = _KnownHashes(Path(config.cache_dir))
    # by content, so that a file keeps its tokens under a new name; of the names, only what decides how the bytes are
    # read
    key = fingerprint([(hashes.sha256(Path(path)), *reading_of(path)) for path in paths], column, config.max_samples)
    described = paths[0] if len(paths) == 1 else f"{len(paths):,} files, {paths[0]} to {paths[-1]}"
    empty = sum(not size for size in sizes)
    return Corpus(
        f"{described} ({describe_column(first, column)}{f'; {empty} of them empty' if empty else ''})",
        f"files-{key}",
        lambda: parts,
        estimate,
        config.max_samples,
        remember=hashes.save,
    )


def _estimate(paths: list[str], sizes: list[int], max_samples: int | None, bytes_a_document: float) -> Estimate:
    """From the files' sizes and the length of the first texts."""
    megabytes = 0.0
    for path, size in zip(paths, sizes):
        expansion = (
            PARQUET_EXPANSION if file_kind(path) == "parquet" else EXPANSION if path.endswith(COMPRESSIONS) else 1.0
        )
        megabytes += size * expansion / 1e6
    documents = max(1, round(megabytes * 1e6 / max(1.0, bytes_a_document + 1)))
    if max_samples is not None and max_samples < documents:
        megabytes, documents = megabytes * max_samples / documents, max_samples
    return Estimate(documents, megabytes)


class _KnownHashes:
    """The SHA-256 of files, saved in the cache with device, inode, size and times, so that large files are not read
    in full at every start."""

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / HASHES
        self._new: dict[str, dict] = {}
        self._known = self._read()

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        file, stamp = f"{stat.st_dev}:{stat.st_ino}", [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = self._known.get(file)
        if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
            return entry["sha256"]
        is_settled = time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS
        entry = {"stamp": stamp, "sha256": sha256(path)}
        if is_settled:
            self._new[file] = entry
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
