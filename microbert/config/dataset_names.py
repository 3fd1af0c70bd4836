"""What the constant `dataset` can name: files by paths, folders and globs, or a dataset of the Hugging Face Hub.

Only the standard library is imported here, for config.py has to answer at once.
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

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
BESIDE_DATA = {"dataset_infos.json", "dataset_dict.json"}  # what the Hub and `datasets` write beside the data
BESIDE_ARROW = {"dataset_info.json", "state.json"}
KNOWN_KINDS = (
    f"Known kinds are {', '.join(FILE_KINDS)}, also with {', '.join(COMPRESSIONS)} after them, "
    "and text files without an ending"
)
MOST_NAMES = 5  # of files in a message
MOST_COMMAS = 8  # in one name


def file_kind(path: str) -> str | None:
    """The format of a file by its name, compressed or not; None for an unknown one."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FILE_KINDS.get(suffixes[-1]) if suffixes else None


def has_ending(path: str) -> bool:
    """Whether a file's name ends in .something that says what it is; an ending for a compression alone says nothing."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return bool(suffixes) and not (len(suffixes) == 1 and suffixes[0] in COMPRESSIONS)


def named_files(dataset: str, *own_folders: str) -> list[str]:
    """The files that paths, folders and globs name, separated by commas; sorted within each part, so that every run
    reads them in one order.

    A folder stands for the files of a known kind, or without an ending, in and below it. Empty for what is no path.
    Raises InputError as `find_files` does.
    """
    return find_files(dataset, *own_folders)[0]


def find_files(dataset: str, *own_folders: str) -> tuple[list[str], list[str]]:
    """The files that `dataset` names, as for `named_files`, and those of an unknown kind in its folders, which are left
    out.

    Hidden files and those in `own_folders` belong to neither. Links to folders are followed. Raises InputError for a
    link to nowhere, for a path that exists and holds no file to read, and when one part of several names no file.
    """
    files: list[str] = []
    left_out: list[str] = []
    own = {Path(folder).resolve() for folder in own_folders}
    parts = _parts(dataset)
    for part in parts:
        found, unknown = _files_of(part, own)
        if not found and len(parts) > 1:
            raise InputError(f'dataset: no file at "{part}"')
        files += found
        left_out += unknown
    different = {os.path.realpath(file): file for file in reversed(files)}  # a file that two names lead to is read once
    return list(reversed(different.values())), left_out


def _parts(dataset: str) -> list[str]:
    """The names and globs that commas separate. What exists under a name with commas or outer spaces is one name."""
    pieces = dataset.split(",")
    parts, first = [], 0
    while first < len(pieces):
        ends = range(min(len(pieces), first + MOST_COMMAS + 1), first, -1)
        whole = {end: os.path.expanduser(",".join(pieces[first:end])) for end in ends}
        end = next((end for end in ends if _exists(whole[end])), first + 1)
        part = whole[end] if end > first + 1 or _exists(whole[end]) else os.path.expanduser(pieces[first].strip())
        if part.strip():
            parts.append(part)
        first = end
    return parts


def _exists(path: str) -> bool:
    """Whether there is something at this path, a link to nowhere included.

    Raises InputError where that is not to be seen.
    """
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP):
            raise InputError(f"dataset: {path} cannot be read: {error.strerror}") from None
        return False  # not there, or many names in one, which are too long for one
    except ValueError:
        return False
    return True


def _files_of(part: str, own: set[Path]) -> tuple[list[str], list[str]]:
    """The files of one part of the constant, and those of an unknown kind in its folders."""
    matches = [part] if _exists(part) else sorted(glob.glob(part, recursive=True))
    named = [match for match in matches if _is_regular(match)]
    folders = [match for match in matches if not _is_regular(match)]
    below = sorted({file for folder in folders for file in _files_below(folder, own)} - set(named))
    is_known = {file: bool(file_kind(file) or not has_ending(file)) for file in below}
    files = sorted([*named, *(file for file in below if is_known[file] and _is_regular(file))])
    unknown = [file for file in below if not is_known[file]]
    if folders and not files:
        holds = f"no file of a known kind: {some_names(unknown)}" if unknown else "no file"
        raise InputError(f"dataset: {part} holds {holds}. {KNOWN_KINDS}")
    return files, unknown


def _is_regular(path: str) -> bool:
    """Whether the path leads to a file, and not to a folder.

    Raises InputError for a link to nowhere, for what cannot be read, and for what is neither a file nor a folder.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path) and error.errno == errno.ENOENT:
            raise InputError(f"dataset: {path} is a link to {os.readlink(path)}, which does not exist") from None
        raise InputError(f"dataset: {path} cannot be read: {error.strerror}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"dataset: {path} is neither a file nor a folder")
    return stat.S_ISREG(mode)


def _files_below(folder: str, own: set[Path]) -> Iterator[str]:
    """All files that are not hidden, of any kind, each folder once however many links lead to it.

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
        beside_data = BESIDE_DATA | (BESIDE_ARROW if any(name.endswith(".arrow") for name in names) else set())
        yield from (str(Path(parent, name)) for name in names if not name.startswith(".") and name not in beside_data)


def some_names(paths: list[str]) -> str:
    """The first names of a list, for people."""
    return ", ".join(paths[:MOST_NAMES]) + (f" and {len(paths) - MOST_NAMES:,} more" if len(paths) > MOST_NAMES else "")


def hub_id(dataset: str) -> tuple[str, str | None] | None:
    """("org/name", configuration or None) of a Hugging Face Hub id, None where `dataset` cannot be one."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", dataset)
    if not match or file_kind(dataset) or dataset[0] == "." or match[1].endswith("."):
        return None
    return match[1], match[2]
