"""Open a file by its name and its first bytes: decompress it, and refuse formats that this suite cannot read.

Names are often wrong: a browser decompresses a download and keeps its name, a program writes gzip to `.jsonl`. So the
first bytes decide how a file is compressed and which formats are refused.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pyarrow as pa

from microbert.config.dataset_names import COMPRESSIONS, KNOWN_KINDS, file_kind, has_extension
from microbert.errors import InputError
from microbert.runtime.files import find_shortage

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)  # the errors of reading a damaged file
HEAD_BYTES = 4096
PARQUET = re.compile(rb"PAR1[\0-\x1f]")
JSON_OBJECT = re.compile(rb'[\[\s]*\{\s*"')
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_ADVICE = "is a Git LFS pointer, not the file itself: run git lfs pull in the repository that it comes from"
MAX_POINTER_SIZE = 1024  # bytes, as Git LFS specifies
MAX_NUL_SHARE = 0.1  # of the first bytes: about half of text in UTF-16 is NUL, but a stray NUL in text is accepted
# the first bytes of files that are often mistaken for text
UNSUPPORTED = {
    b"PK\x03\x04": "a ZIP archive (as Excel and Word files are): save it as .csv, or extract it",
    b"%PDF-": "a PDF file: extract its text first",
    b"\xff\xfe": "text in UTF-16: save it as UTF-8",
    b"\xfe\xff": "text in UTF-16: save it as UTF-8",
    b"\xd0\xcf\x11\xe0": "an Excel or Word file of an old version: save it as .csv or .txt",
    b"7z\xbc\xaf": "a 7-Zip archive: extract it",
    b"Rar!\x1a\x07": "a RAR archive: extract it",
    b"SQLite format 3": "an SQLite database: export it as .csv",
    b"ARROW1": "an Arrow file: save it as .parquet",
    b"\x89HDF": "an HDF5 file: save it as .parquet",
    b"\x04\x22\x4d\x18": "compressed by LZ4: decompress it",
    b"Obj\x01": "an Avro file: save it as .parquet",
}


def _open_plain(path: str) -> io.BufferedReader:
    return open(path, "rb")


def _open_zst(path: str) -> io.BufferedReader:
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), "zstd"))


# the first bytes of a compressed file -> the function that opens it
DECOMPRESSORS: dict[re.Pattern[bytes], Callable[[str], io.BufferedReader]] = {
    re.compile(rb"\x1f\x8b"): cast(Callable[[str], io.BufferedReader], gzip.open),  # they have `peek`, too
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): cast(Callable[[str], io.BufferedReader], bz2.open),
    re.compile(rb"\xfd7zXZ\0"): cast(Callable[[str], io.BufferedReader], lzma.open),
    re.compile(rb"\x28\xb5\x2f\xfd"): _open_zst,
}


@contextlib.contextmanager
def reading_errors(path: str) -> Iterator[None]:
    """Turn errors of opening, decompressing or reading a file into InputError with its name.

    A shortage of open files, memory or disk is raised as its OSError: the file may be intact.
    """
    try:
        yield
    except DAMAGE as error:
        if shortage := find_shortage(error):
            raise shortage from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: cannot be read: {reason}") from error


def open_file(path: str) -> io.BufferedReader:
    """Open a file, decompressed if its first bytes are those of a compressed file.

    Raises InputError for an unsupported content, and DAMAGE if the file cannot be opened.
    """
    with open(path, "rb") as raw:
        head = raw.read(HEAD_BYTES)
    ending = Path(path).suffix.lower()
    opener = next((opener for magic, opener in DECOMPRESSORS.items() if magic.match(head)), None)
    if opener is None and ending in COMPRESSIONS and head:
        raise InputError(
            f"{path}: cannot be read: its content is not compressed as {ending}; remove {ending} from its name"
        )
    file = (opener or _open_plain)(path)
    try:
        _refuse_unsupported(path, file.peek(HEAD_BYTES)[:HEAD_BYTES])
    except BaseException:
        file.close()
        raise
    return file


def _refuse_unsupported(path: str, head: bytes) -> None:
    """Raise InputError if the first bytes, decompressed, are those of an unsupported format."""
    if head.startswith(LFS_POINTER):
        raise InputError(f"{path} {LFS_ADVICE}")
    what = next((what for magic, what in UNSUPPORTED.items() if head.startswith(magic)), "")
    if not what and not PARQUET.match(head) and head.count(b"\0") > MAX_NUL_SHARE * len(head):
        what = "binary, or text in UTF-16: save text as UTF-8"
    if what:
        raise InputError(f"{path}: cannot be read as text: it is {what}")


def detect_kind(path: str, file: io.BufferedReader) -> str:
    """Return the format of an opened file, "text", "json", "csv" or "parquet": by its name, else by its content.

    Parquet is detected by content whatever the name. Raises InputError for an unsupported extension.
    """
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    if PARQUET.match(head):
        return "parquet"
    if kind := file_kind(path):
        return kind
    if has_extension(path):
        raise InputError(f"{path}: unsupported file format. {KNOWN_KINDS}")
    return "json" if JSON_OBJECT.match(head) else "text"  # WikiExtractor writes both without an extension


def is_readable(path: str) -> bool:
    """Return whether a file without an extension begins with UTF-8 text or is parquet.

    Raises InputError if it cannot be opened.
    """
    with reading_errors(path):
        try:
            with open_file(path) as file:
                head = file.read(HEAD_BYTES)
        except InputError:
            return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(head, final=len(head) < HEAD_BYTES)  # the head may end within a character
    except UnicodeDecodeError:
        return PARQUET.match(head) is not None
    return True


def is_lfs_pointer(path: str) -> bool:
    """Return whether the file is a Git LFS pointer to the actual file."""
    if os.path.getsize(path) > MAX_POINTER_SIZE:
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
