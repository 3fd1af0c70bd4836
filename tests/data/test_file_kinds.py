"""Files whose content differs from what their name says."""

import bz2
import errno
import gzip
import io
import lzma
import os
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest

from microbert.data.file_formats import find_text_column, read_rows
from microbert.data.file_kinds import is_lfs_pointer, is_readable
from microbert.errors import InputError

LINES = b'{"text": "one text"}\n{"text": "another one"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def write(path, content):
    path.write_bytes(content)
    return str(path)


def read(path):
    return [text for rows in read_rows(path, find_text_column(path, None)) for text in rows]


@pytest.mark.parametrize("name", ["a.jsonl", "a", "a.jsonl.bz2"])
@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_file_is_read_under_any_name(name, compress, tmp_path):
    assert read(write(tmp_path / name, compress(LINES))) == ["one text", "another one"]


def test_parquet_is_read_under_any_name(tmp_path):
    pa.parquet.write_table(pa.table({"text": ["one text", "another one"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.txt", "a"):
        (tmp_path / "a.parquet").rename(tmp_path / name)
        assert read(str(tmp_path / name)) == ["one text", "another one"]
        (tmp_path / name).rename(tmp_path / "a.parquet")


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/sheet.xml", "text")
    return file.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (archive(), "ZIP archive"),
        (b"%PDF-1.7 text", "PDF"),
        ("text in utf-16\n".encode("utf-16"), "UTF-16"),
        ("text in utf-16\n".encode("utf-16-le"), "UTF-16"),
        (POINTER, "Git LFS pointer"),
        (gzip.compress(archive()), "ZIP archive"),
        (bytes(range(256)) + bytes(1000), "binary"),
    ],
    ids=["zip", "pdf", "utf-16", "utf-16 without a mark", "pointer", "zip in gzip", "binary"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a"])
def test_an_unsupported_format_is_named(name, content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(ending, tmp_path):
    with pytest.raises(InputError, match=f"cannot be read: its content is not compressed as .{ending}"):
        read(write(tmp_path / f"a.jsonl.{ending}", LINES))


@pytest.mark.parametrize(
    "text", ["BZhang wrote this", "Rar! it said", "%PDF is a format", "PAR1 is a magic word", "PK is Pakistan"]
)
def test_text_that_begins_like_another_format_is_read(text, tmp_path):
    assert read(write(tmp_path / "a.txt", text.encode())) == [text]


def test_lines_that_end_with_a_carriage_return_alone_are_refused(tmp_path):
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        with pytest.raises(InputError, match="lines end with a lone carriage return"):
            read(write(tmp_path / name, b"text\rone\rtwo\r"))
    with pytest.raises(InputError, match="lines end with a lone carriage return"):
        list(read_rows(write(tmp_path / "a.txt", b"one\rtwo\r"), "text"))
    assert read(write(tmp_path / "a.txt", b"one\r\ntwo\rhalves\n")) == ["one", "two\rhalves"]


def test_a_file_without_an_extension_is_read_as_text_or_json_lines(tmp_path):
    assert read(write(tmp_path / "wiki_00", b"<doc>\nsome text\n</doc>\n")) == ["<doc>", "some text", "</doc>"]
    for content in (LINES, b'[{ "text": "one text"},\n{"text": "another one"}]'):
        assert read(write(tmp_path / "wiki_01", content)) == ["one text", "another one"]


def test_too_many_open_files_are_not_blamed_on_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", b"text\n")
    monkeypatch.setattr(
        "microbert.data.file_kinds.open", lambda *_: os.open("/", os.O_WRONLY | os.O_DIRECTORY), raising=False
    )
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read(path)

    def no_more(*_):
        raise OSError(errno.EMFILE, "Too many open files", path)

    monkeypatch.setattr("microbert.data.file_kinds.open", no_more, raising=False)
    with pytest.raises(OSError, match="Too many open files"):
        read(path)


def test_text_is_detected_by_its_first_bytes(tmp_path):
    euro = "€".encode()
    for content in (b"", b"text", b"x" * 4095 + euro, b"x" * 4094 + euro, b"x" * 9000, gzip.compress(b"text")):
        assert is_readable(write(tmp_path / "a", content))
    for content in (b"caf\xe9\n", b"x" * 100 + b"\xff" + b"x" * 5000, archive(), euro[:2]):
        assert not is_readable(write(tmp_path / "a", content))
    assert (
        is_lfs_pointer(write(tmp_path / "a", POINTER))
        and not is_lfs_pointer(write(tmp_path / "a", POINTER * 99))
        and not is_lfs_pointer(write(tmp_path / "a", b""))
    )
