"""Write files atomically, check folders, and explain errors of the file system."""

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

# a file is missing or is not a file; any other number is an error of the system
NOT_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the last for `ulimit -f`; Python ignores its signal
SHORTAGES = DISK_FULL | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
REMEDIES = {
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "free some memory",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, and rename it to `path` at the end of the block.

    After a kill or an error, `path` is the complete old file or the complete new one.
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
    """Call `write` with the file that `open_atomic` opens."""
    with open_atomic(path) as file:
        write(file)


def system_trouble(error: BaseException) -> str:
    """Return why the system cannot read or write a file: no access, too many open files, a full disk, no memory.

    Return "" for any other error, including those for a missing or damaged file: only then may callers replace it.
    """
    if isinstance(error, MemoryError):
        return "out of memory"
    if not isinstance(error, OSError) or error.errno is None or error.errno in NOT_A_FILE:
        return ""
    what = error.strerror or os.strerror(error.errno)
    where = f": {error.filename}" if error.filename else ""
    return what + where + (f" ({REMEDIES[error.errno]})" if error.errno in REMEDIES else "")


def find_shortage(error: BaseException) -> OSError | None:
    """Return the error itself, or one of its causes, that says the disk, the memory or the open files ran out.

    Libraries raise errors of their own for it, some of them with `from None`.
    """
    waiting, seen = [error], set()
    while waiting:
        error = waiting.pop()
        if isinstance(error, OSError) and error.errno in SHORTAGES:
            return error
        seen.add(id(error))
        causes = (error.__context__, error.__cause__)
        waiting += [cause for cause in causes if cause is not None and id(cause) not in seen]
    return None


def remove_stale(folder: Path) -> None:
    """Remove the temporary files that a killed process left in `folder`. Requires the folder's lock."""
    for path in folder.glob(".*.tmp"):
        if path.is_file() or path.is_symlink():
            path.unlink()


def remove(path: Path) -> None:
    """Remove a file, a symbolic link (not its target) or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_link(folder: Path) -> None:
    """Raise InputError if the folder is a symbolic link, because we would write and remove files somewhere else."""
    if folder.is_symlink():
        raise InputError(f"{folder} is a link: remove it, so that a folder can be created")


def not_writable(folder: Path) -> Path | None:
    """Return what keeps files from being written to a folder, which may be missing: itself, or a folder above it.

    Return None if nothing does.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return None if existing.is_dir() and os.access(existing, os.W_OK) else existing


def private_folder(path: Path) -> Path:
    """Return the folder without symbolic links in its path. Create it with mode 0700 if it is missing.

    For files that are loaded as code. Raises OSError, before creating anything, if another user could put files into
    the folder or replace it: if it, or a folder above it, is a link, belongs to or can be written to by another user.
    """
    if path.is_symlink():
        raise PermissionError(f"{path} is a link")
    path = path.resolve()
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
        if os.name != "nt":  # Windows protects the folders below a user's own by access lists
            _check_owner(folder, is_above=folder != path)
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder")
    return path


def _check_owner(folder: Path, is_above: bool) -> None:
    """Raise PermissionError if another user could put files into the folder, or (is_above) replace those in it."""
    found = folder.stat()
    if found.st_uid != os.geteuid() and not (is_above and found.st_uid == 0):
        raise PermissionError(f"{folder} belongs to another user")
    is_sticky = is_above and found.st_mode & stat.S_ISVTX  # as /tmp: users can remove only their own files
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky:
        raise PermissionError(f"{folder} can be written to by other users")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8. Lone surrogates, from file names that are not UTF-8, are escaped as in JSON."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """Return the JSON object in a file. Raises OSError or ValueError if the file is missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows cannot open folders, and does not need it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: object) -> str:
    """Return a short key for JSON-serialisable parts: equal parts have the same key on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
