"""What the constant `dataset` can name: files by paths, folders and globs, or a dataset of the Hugging Face Hub.

Only the standard library is imported here, for config.py has to answer at once.
"""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

FILE_KINDS = {".txt": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DATASET_CARD = "dataset_infos.json"  # which the Hub lays beside the data


class InputError(Exception):
    """Something that the user can fix: told in one or two plain lines, exit code 2."""


def file_kind(path: str) -> str | None:
    """The format of a file by its name, compressed or not; None for an unknown one."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FILE_KINDS.get(suffixes[-1]) if suffixes else None


def named_files(dataset: str, *own_folders: str) -> list[str]:
    """The files that paths, folders and globs name, parted by commas; each part's files sorted, so that every run reads them in one order.

    A folder stands for all files of a known kind in and below it, hidden ones and those in own_folders left out. Empty for what is no path.
    Raises InputError when one part of several names no file.
    """
    if _is_file(dataset):  # its name may hold a comma
        return [dataset]
    files, parts = [], [os.path.expanduser(part.strip()) for part in dataset.split(",") if part.strip()]
    for part in parts:
        if _is_file(part):
            found = [part]
        elif os.path.isdir(part):
            found = sorted(_files_below(Path(part), {Path(folder).resolve() for folder in own_folders}))
        else:
            found = sorted(file for file in glob.glob(part, recursive=True) if _is_file(file))
        if not found and len(parts) > 1:
            raise InputError(f'dataset: no file at "{part}"')
        files += found
    return list(dict.fromkeys(files))  # a file that two globs name is read once


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # many names in one are too long for one
        return False


def _files_below(folder: Path, leave_out: set[Path]) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(parent, name).resolve() not in leave_out]
        yield from (str(Path(parent, name)) for name in names if not name.startswith(".") and file_kind(name) and name != DATASET_CARD)


def hub_id(dataset: str) -> tuple[str, str | None] | None:
    """("org/name", configuration or None) of a Hugging Face Hub id, None where `dataset` cannot be one."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", dataset)
    if not match or file_kind(dataset) or dataset[0] == "." or match[1].endswith("."):
        return None
    return match[1], match[2]
