"""Files whose content is not what their name says."""

import bz2
import gzip
import io
import lzma
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest

from microbert.config import InputError
from microbert.file_formats import find_text_column, read_rows
from microbert.file_kinds import is_pointer, is_text

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
    "content, told",
    [
        (archive(), "ZIP archive"),
        (b"%PDF-1.7 text", "PDF"),
        ("text in utf-16\n".encode("utf-16"), "UTF-16"),
        ("text in utf-16\n".encode("utf-16-le"), "UTF-16"),
        (POINTER, "Git LFS pointer"),
        (gzip.compress(archive()), "ZIP archive"),
        (bytes(range(256)) + bytes(1000), "binary"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a"])
def test_what_is_no_text_is_named(name, content, told, tmp_path):
    with pytest.raises(InputError, match=told):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(ending, tmp_path):
    with pytest.raises(InputError, match=f"cannot be read: its content is not compressed as .{ending}"):
        read(write(tmp_path / f"a.jsonl.{ending}", LINES))


def test_a_file_without_an_ending_is_lines_of_text_or_of_json(tmp_path):
    assert read(write(tmp_path / "wiki_00", b"<doc>\nsome text\n</doc>\n")) == ["<doc>", "some text", "</doc>"]
    assert read(write(tmp_path / "wiki_01", LINES)) == ["one text", "another one"]


def test_text_is_told_by_its_first_bytes(tmp_path):
    euro = "€".encode()
    for content in (b"", b"text", b"x" * 4095 + euro, b"x" * 4094 + euro, b"x" * 9000, gzip.compress(b"text")):
        assert is_text(write(tmp_path / "a", content))
    for content in (b"caf\xe9\n", b"x" * 100 + b"\xff" + b"x" * 5000, archive(), euro[:2]):
        assert not is_text(write(tmp_path / "a", content))
    assert (
        is_pointer(write(tmp_path / "a", POINTER))
        and not is_pointer(write(tmp_path / "a", POINTER * 99))
        and not is_pointer(write(tmp_path / "a", b""))
    )
