"""Files that appear whole or not at all: write beside, flush to disk, rename."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from microbert.errors import InputError

# what says that a file is missing or something else; any other number is trouble of the system
NOT_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the last for `ulimit -f`; Python ignores its signal
REMEDIES = {
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "free some memory",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing, and rename it to `path` at the end of the block.

    A kill or an error leaves the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on what `open_atomic` opens."""
    with open_atomic(path) as file:
        write(file)


def system_trouble(error: BaseException) -> str:
    """Return why the system could not read or write a file: no access, too many open files, a full disk, no memory.

    Return "" for any other error, also for one which says that a file is missing or damaged. Only then may a file be
    ignored or replaced.
    """
    if isinstance(error, MemoryError):
        return "out of memory"
    if not isinstance(error, OSError) or error.errno is None or error.errno in NOT_A_FILE:
        return ""
    what = error.strerror or os.strerror(error.errno)
    where = f": {error.filename}" if error.filename else ""
    return what + where + (f" ({REMEDIES[error.errno]})" if error.errno in REMEDIES else "")


def remove_stale(folder: Path) -> None:
    """Removes the temporary files that a kill left in `folder`. Only for whoever holds the folder's lock."""
    for path in folder.glob(".*.tmp"):
        if path.is_file() or path.is_symlink():
            path.unlink()


def remove(path: Path) -> None:
    """A file, a link (and not what it leads to), or a folder with all that is in it; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_link(folder: Path) -> None:
    """Raises InputError where a folder of ours is a link: what is in the other place is not ours to write and remove."""
    if folder.is_symlink():
        raise InputError(f"{folder} is a link: remove it, so that a folder can stand there")


def private_folder(path: Path) -> Path:
    """Return the folder without links in its path, made with mode 0700 where it is missing.

    For files that are loaded as code. Raises OSError, before anything is made, where another user could put files into
    the folder or replace it: where it is a link, belongs to somebody else or may be written to by others, or where this
    holds for a folder above it.
    """
    if path.is_symlink():
        raise PermissionError(f"{path} is a link")
    path = path.resolve()
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
        if os.name != "nt":  # there, access lists protect the folders below a user's own
            _check_owner(folder, is_above=folder != path)
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder")
    return path


def _check_owner(folder: Path, is_above: bool) -> None:
    """Raise PermissionError where another user could put files into the folder; or, of one above, replace what is in
    it."""
    found = folder.stat()
    if found.st_uid != os.geteuid() and not (is_above and found.st_uid == 0):
        raise PermissionError(f"{folder} belongs to another user")
    is_sticky = is_above and found.st_mode & stat.S_ISVTX  # as /tmp is: there, nobody removes what is another user's
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky:
        raise PermissionError(f"{folder} can be written to by other users")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8. Lone surrogates, which come from file names that are not UTF-8, are escaped as JSON does it."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """Raises OSError or ValueError when the file is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable. Windows cannot open folders, and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: object) -> str:
    """A short key of anything that JSON can hold: equal parts, equal key, on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
