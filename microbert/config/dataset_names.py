"""What the constant `dataset` can name: files, folders and globs, or a dataset of the Hugging Face Hub.

This module imports only the standard library, because every command line is checked with it at once.
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from microbert.errors import InputError

FILE_KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
METADATA_FILES = {"dataset_infos.json", "dataset_dict.json"}  # written by the Hub and `datasets`, in a folder of data
ARROW_METADATA_FILES = {"dataset_info.json", "state.json"}
KNOWN_KINDS = (
    f"Supported are {', '.join(FILE_KINDS)}, also compressed ({', '.join(COMPRESSIONS)}), "
    "and text files without an extension"
)
MAX_LISTED_FILES = 5  # in a message
MAX_COMMAS = 8  # in one name


def file_kind(path: str) -> str | None:
    """Return the format of a file by its name, compressed or not: "text", "json", "csv", "parquet", None if unknown."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FILE_KINDS.get(suffixes[-1]) if suffixes else None


def has_extension(path: str) -> bool:
    """Return whether a file's name has an extension, apart from that of a compression."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return bool(suffixes) and not (len(suffixes) == 1 and suffixes[0] in COMPRESSIONS)


class FoundFiles(NamedTuple):
    """paths: files to read, in order. unsupported: files of unsupported formats in the folders, which are skipped."""

    paths: list[str]
    unsupported: list[str]


def find_local_files(dataset: str, *own_folders: str) -> FoundFiles:
    """Return the files that paths, folders and globs name, separated by commas.

    The paths are sorted within each name, so every run reads them in the same order. They are empty if `dataset` is no
    path. A folder stands for the files in and below it whose format is supported, or which have no extension. Links to
    folders are followed. Hidden files and files in `own_folders` are ignored.
    Raises InputError for a broken link, for a path without a file to read, and if one of several names matches no file.
    """
    paths: list[str] = []
    unsupported: list[str] = []
    own = {Path(folder).resolve() for folder in own_folders}
    names = _split_names(dataset)
    for name in names:
        found = _find_files_of(name, own)
        if not found.paths and len(names) > 1:
            raise InputError(f'dataset: no file matches "{name}"')
        paths += found.paths
        unsupported += found.unsupported
    different = {os.path.realpath(path): path for path in reversed(paths)}  # read a file with two names once
    return FoundFiles(list(reversed(different.values())), unsupported)


def _split_names(dataset: str) -> list[str]:
    """Split at commas. An existing path that contains commas or outer spaces is one name."""
    pieces = dataset.split(",")
    names: list[str] = []
    first = 0
    while first < len(pieces):
        ends = range(min(len(pieces), first + MAX_COMMAS + 1), first, -1)
        whole = {end: os.path.expanduser(",".join(pieces[first:end])) for end in ends}
        end = next((end for end in ends if _exists(whole[end])), first + 1)
        name = whole[end] if end > first + 1 or _exists(whole[end]) else os.path.expanduser(pieces[first].strip())
        if name.strip():
            names.append(name)
        first = end
    return names


def _exists(path: str) -> bool:
    """Return whether the path exists, as a broken link too. Raises InputError if permissions hide that."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP):
            raise InputError(f"dataset: {path} cannot be read: {error.strerror}") from None
        return False  # missing, or a list of names that is too long for a path
    except ValueError:
        return False
    return True


def _find_files_of(name: str, own: set[Path]) -> FoundFiles:
    """Return the files of one path, folder or glob."""
    matches = [name] if _exists(name) else sorted(glob.glob(name, recursive=True))
    named = [match for match in matches if _is_regular(match)]
    folders = [match for match in matches if not _is_regular(match)]
    below = sorted({file for folder in folders for file in _files_below(folder, own)} - set(named))
    is_supported = {file: bool(file_kind(file) or not has_extension(file)) for file in below}
    paths = sorted([*named, *(file for file in below if is_supported[file] and _is_regular(file))])
    unsupported = [file for file in below if not is_supported[file]]
    if folders and not paths:
        content = f"only files of unsupported formats: {some_names(unsupported)}" if unsupported else "no files"
        raise InputError(f"dataset: {name} contains {content}. {KNOWN_KINDS}")
    return FoundFiles(paths, unsupported)


def _is_regular(path: str) -> bool:
    """Return whether the path is a file, not a folder.

    Raises InputError for a broken link, an unreadable path, and for anything else, such as a socket.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path) and error.errno == errno.ENOENT:
            raise InputError(f"dataset: {path} is a broken link: {os.readlink(path)} does not exist") from None
        raise InputError(f"dataset: {path} cannot be read: {error.strerror}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"dataset: {path} is neither a file nor a folder")
    return stat.S_ISREG(mode)


def _files_below(folder: str, own: set[Path]) -> Iterator[str]:
    """Yield all files in and below a folder that are not hidden; each folder once, even if several links lead to it.

    Raises InputError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"dataset: {error.filename} cannot be read: {error.strerror}") from None

    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # two links to one folder, or a link to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(parent, name).resolve() not in own
        )
        metadata = METADATA_FILES | (ARROW_METADATA_FILES if any(name.endswith(".arrow") for name in names) else set())
        yield from (str(Path(parent, name)) for name in names if not name.startswith(".") and name not in metadata)


def some_names(paths: list[str]) -> str:
    """Return the first names of a list, for a message."""
    return ", ".join(paths[:MAX_LISTED_FILES]) + (
        f" and {len(paths) - MAX_LISTED_FILES:,} more" if len(paths) > MAX_LISTED_FILES else ""
    )


def hub_id(dataset: str) -> tuple[str, str | None] | None:
    """Return ("org/name", configuration or None) for a Hugging Face Hub id, None if `dataset` cannot be one."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", dataset)
    if not match or file_kind(dataset) or dataset[0] == "." or match[1].endswith("."):
        return None
    return match[1], match[2]
