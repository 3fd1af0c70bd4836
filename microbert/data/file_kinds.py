"""What a file is, by its name and its first bytes: opened, decompressed, and refused with its reason where no format
here can read it.

Names are often wrong: a browser decompresses a download and keeps its name, a program writes gzip to `.jsonl`. So the
first bytes decide how a file is compressed, and name both what is read and what is refused.
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
from typing import BinaryIO

import pyarrow as pa

from microbert.config.dataset_names import COMPRESSIONS, KNOWN_KINDS, file_kind, has_ending
from microbert.errors import InputError
from microbert.runtime.files import find_shortage

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)  # what opening or reading a file raises
HEAD_BYTES = 4096
PARQUET = re.compile(rb"PAR1[\0-\x1f]")
JSON_OBJECT = re.compile(rb'[\[\s]*\{\s*"')
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024  # bytes, as Git LFS specifies
MOST_NULS = 0.1  # of the first bytes: text in UTF-16 has about a half, a stray NUL in text is no reason to refuse it
# the first bytes of files that are often taken for text
FOREIGN = {
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


def _open_zst(path: str) -> BinaryIO:
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), "zstd"))


# the first bytes of a compressed file -> what opens it
DECOMPRESSORS: dict[re.Pattern[bytes], Callable[[str], BinaryIO]] = {
    re.compile(rb"\x1f\x8b"): gzip.open,
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): bz2.open,
    re.compile(rb"\xfd7zXZ\0"): lzma.open,
    re.compile(rb"\x28\xb5\x2f\xfd"): _open_zst,
}


@contextlib.contextmanager
def errors_of_reading(path: str) -> Iterator[None]:
    """Raises InputError with the file's name for what opening, decompressing or reading it raises.

    Where open files, memory or the disk ran out, that is raised as it is: the file may be as it should.
    """
    try:
        yield
    except DAMAGE as error:
        if shortage := find_shortage(error):
            raise shortage
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: cannot be read: {reason}") from error


def open_file(path: str) -> BinaryIO:
    """The content of a file, decompressed where its first bytes say that it is compressed, with the method `peek`.

    Raises InputError where the content is of a kind that is not read here, DAMAGE where it cannot be opened.
    """
    with open(path, "rb") as raw:
        head = raw.read(HEAD_BYTES)
    ending = Path(path).suffix.lower()
    opener = next((opener for magic, opener in DECOMPRESSORS.items() if magic.match(head)), None)
    if opener is None and ending in COMPRESSIONS and head:
        raise InputError(f"{path}: cannot be read: its content is not compressed as {ending}; rename it to what it is")
    file = opener(path) if opener else open(path, "rb")
    try:
        _refuse_foreign(path, file.peek(HEAD_BYTES)[:HEAD_BYTES])
    except BaseException:
        file.close()
        raise
    return file


def _refuse_foreign(path: str, head: bytes) -> None:
    """head: the first bytes, decompressed. Raises InputError where they are those of another kind of file."""
    if head.startswith(LFS_POINTER):
        raise InputError(
            f"{path} is a Git LFS pointer, not the file that it stands for: run git lfs pull where it comes from"
        )
    what = next((what for magic, what in FOREIGN.items() if head.startswith(magic)), "")
    if not what and not PARQUET.match(head) and head.count(b"\0") > MOST_NULS * len(head):
        what = "binary, or text in UTF-16: save text as UTF-8"
    if what:
        raise InputError(f"{path} cannot be read as text: it is {what}")


def kind_of(path: str, file: BinaryIO) -> str:
    """The format of an opened file: "text", "json", "csv" or "parquet", by its name; where that names none, or is wrong
    about parquet, by its content.

    Raises InputError for an ending of no known kind.
    """
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    if PARQUET.match(head):
        return "parquet"
    if kind := file_kind(path):
        return kind
    if has_ending(path):
        raise InputError(f"{path}: unknown kind of file. {KNOWN_KINDS}")
    return "json" if JSON_OBJECT.match(head) else "text"  # as WikiExtractor writes both


def is_readable(path: str) -> bool:
    """Whether the first bytes of a file without an ending are text in UTF-8, or those of parquet.

    Raises InputError where it cannot be read.
    """
    with errors_of_reading(path):
        try:
            with open_file(path) as file:
                head = file.read(HEAD_BYTES)
        except InputError:
            return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(head, final=len(head) < HEAD_BYTES)  # the end of the head may cut a character
    except UnicodeDecodeError:
        return PARQUET.match(head) is not None
    return True


def is_pointer(path: str) -> bool:
    """Whether Git LFS has left a pointer in the place of the file."""
    if os.path.getsize(path) > LARGEST_POINTER:
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
