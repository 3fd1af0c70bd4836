"""What the constant `dataset` can name: files by paths, folders and globs, or a dataset of the Hugging Face Hub.

Only the standard library is imported here, for config.py has to answer at once.
"""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

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
DATASET_CARD = "dataset_infos.json"  # which the Hub lays beside the data
KNOWN_KINDS = (
    f"Known kinds are {', '.join(FILE_KINDS)}, also with {', '.join(COMPRESSIONS)} after them, "
    "and text files without an ending"
)
MOST_NAMES = 5  # of files in a message


class InputError(Exception):
    """Something that the user can fix: told in one or two plain lines, exit code 2."""


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
    if _is_file(dataset):  # its name may hold a comma
        return [dataset], []
    files: list[str] = []
    left_out: list[str] = []
    own = {Path(folder).resolve() for folder in own_folders}
    parts = [os.path.expanduser(part.strip()) for part in dataset.split(",") if part.strip()]
    for part in parts:
        found, unknown = _files_of(part, own)
        if not found and len(parts) > 1:
            raise InputError(f'dataset: no file at "{part}"')
        files += found
        left_out += unknown
    return list(dict.fromkeys(files)), left_out  # a file that two globs name is read once


def _files_of(part: str, own: set[Path]) -> tuple[list[str], list[str]]:
    """The files of one part of the constant, and those of an unknown kind in its folder."""
    if os.path.isdir(part):
        folders = [part]
    else:
        matches = [part] if os.path.lexists(part) else sorted(glob.glob(part, recursive=True))
        files = [match for match in matches if _is_regular(match)]
        folders = [] if files else [match for match in matches if os.path.isdir(match)]
        if not folders:
            return files, []
    below = sorted({file for folder in folders for file in _files_below(folder, own)})
    is_known = {file: bool(file_kind(file) or not has_ending(file)) for file in below}
    files = [file for file in below if is_known[file] and _is_regular(file)]
    unknown = [file for file in below if not is_known[file]]
    if not files:
        holds = f"no file of a known kind: {some_names(unknown)}" if unknown else "no file"
        raise InputError(f"dataset: {part} holds {holds}. {KNOWN_KINDS}")
    return files, unknown


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # many names in one are too long for one
        return False


def _is_regular(path: str) -> bool:
    """Whether the path leads to a file.

    Raises InputError for a link to nowhere, and for what is neither a file nor a folder.
    """
    if os.path.isfile(path) or os.path.isdir(path):
        return os.path.isfile(path)
    if os.path.islink(path):
        raise InputError(f"dataset: {path} is a link to {os.readlink(path)}, which does not exist")
    raise InputError(f"dataset: {path} is neither a file nor a folder")


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
        yield from (str(Path(parent, name)) for name in names if not name.startswith(".") and name != DATASET_CARD)


def some_names(paths: list[str]) -> str:
    """The first names of a list, for people."""
    return ", ".join(paths[:MOST_NAMES]) + (f" and {len(paths) - MOST_NAMES:,} more" if len(paths) > MOST_NAMES else "")


def hub_id(dataset: str) -> tuple[str, str | None] | None:
    """("org/name", configuration or None) of a Hugging Face Hub id, None where `dataset` cannot be one."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", dataset)
    if not match or file_kind(dataset) or dataset[0] == "." or match[1].endswith("."):
        return None
    return match[1], match[2]
