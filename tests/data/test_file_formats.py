"""Every format that files of the user's come in, whole or damaged, from any row on."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import ROOT, TIME_LIMIT

from microbert.data.corpus import clean
from microbert.data.file_formats import find_labelled_columns, find_text_column, read_rows
from microbert.errors import InputError

TEXTS = [
    "the first document",
    'größer, "quoted", naïve',
    "中文 and emoji 🙂",
    "NA",
    "12345",
    "2024-01-01",
    "the last one",
]


def zst(data):
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


COMPRESSED = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zst(data[:40]) + zst(data[40:]),
}  # two frames, as parallel writers leave them


def csv_line(*values, delimiter=","):
    return delimiter.join('"' + str(value).replace('"', '""') + '"' for value in values) + "\n"


CONTENTS = {
    ".txt": "".join(text + "\n" for text in TEXTS),
    ".jsonl": "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)),
    ".ndjson": "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS),
    ".json": json.dumps([{"text": text} for text in TEXTS], indent=1),
    ".csv": csv_line("id", "text") + "".join(csv_line(i, text) for i, text in enumerate(TEXTS)),
    ".tsv": csv_line("id", "text", delimiter="\t")
    + "".join(csv_line(i, text, delimiter="\t") for i, text in enumerate(TEXTS)),
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(path, row=0, wanted=None):
    column = find_text_column(path, wanted)
    return [text for rows in read_rows(path, column, row) for text in map(clean, rows)]


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", CONTENTS)
def test_every_format_and_compression_from_every_row_on(suffix, compression, tmp_path):
    path = write(tmp_path / f"data{suffix}{compression}", COMPRESSED[compression](CONTENTS[suffix].encode()))
    for row in range(len(TEXTS) + 1):
        assert read(path, row) == TEXTS[row:]


def test_a_suffix_may_be_in_capitals(tmp_path):
    assert read(write(tmp_path / "DATA.JSONL.GZ", gzip.compress(CONTENTS[".jsonl"].encode()))) == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_parquet_from_every_row_on(kind, group, tmp_path):
    path = str(tmp_path / "data.parquet")
    pa.parquet.write_table(
        pa.table({"id": range(len(TEXTS)), "text": pa.array(TEXTS, kind)}), path, row_group_size=group
    )
    for row in range(len(TEXTS) + 1):
        assert read(path, row) == TEXTS[row:]


@pytest.mark.parametrize("others", [(None, "late"), (None, {"a": 1}), (1, "one"), ({"a": 1}, {"b": "c"}), ([], [1])])
def test_other_columns_of_jsonl_may_hold_anything(others, tmp_path):
    path = write(
        tmp_path / "data.jsonl",
        "".join(json.dumps({"text": "t" * 50, "meta": others[n > 900]}) + "\n" for n in range(1000)),
    )
    assert read(path) == ["t" * 50] * 1000


def test_empty_files_of_every_format_hold_no_row(tmp_path):
    pa.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    empty = {".txt": "", ".jsonl": "\n\n", ".json": "[]", ".csv": "text,id\n", ".tsv": ""}
    paths = [str(tmp_path / "a.parquet")] + [
        write(tmp_path / f"a{suffix}", content) for suffix, content in empty.items()
    ]
    paths.append(write(tmp_path / "a.jsonl.gz", gzip.compress(b"")))
    for path in paths:
        assert find_text_column(path, None) is None
        assert list(read_rows(path, "text")) == []


@pytest.mark.parametrize(
    "content, column",
    [
        ('{"n": 1, "body": "x"}', "body"),
        ('{"text": 5, "body": "x"}', "body"),
        ('{"text": "t", "body": "x"}', "text"),
        ('{"text": "t", "text2": null}', "text"),
    ],
)
def test_the_only_possible_column_is_found(content, column, tmp_path):
    assert find_text_column(write(tmp_path / "a.jsonl", content), None) == column


def test_a_csv_column_of_numbers_is_not_text(tmp_path):
    assert find_text_column(write(tmp_path / "a.csv", "id,score,body\n1,2.5,x\n2,,7\n"), None) == "body"


def test_a_missing_text_is_an_empty_row(tmp_path):
    assert list(read_rows(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"other": 1}\n{"text": null}\n'), "text")) == [
        ["a", None, None]
    ]
    assert list(read_rows(write(tmp_path / "a.csv", "id,text\n1,a\n2\n\n3,b\n"), "text")) == [["a", None, "b"]]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    assert read(write(tmp_path / "a.jsonl", r'{"text": "a \ud800 b \ud83d\ude00"}')) == ["a ? b 😀"]


def test_a_field_of_a_csv_may_hold_lines_and_megabytes(tmp_path):
    assert read(
        write(tmp_path / "a.csv", "text,id\n" + csv_line("one\nand two", 1) + csv_line("x" * 3_000_000, 2))
    ) == ["one\nand two", "x" * 3_000_000]


DAMAGED = {
    "later.csv": ("body,n\ny,2\n", 'no column "text"; it has: body, n'),
    "later.jsonl": ('{"body": "y"}\n', 'no column "text"; it has: body'),
    "much_later.jsonl": ('{"body": "y"}\n' * 300, 'no column "text"; it has: body'),
    "fields.csv": ("text,n\na,1\nb,c,2\n", "line 3 has 3 fields"),
    "number.jsonl": ('{"text": "a"}\n{"text": [1, 2]}\n', r"row 2: .* holds \[1, 2\], not text"),
    "half.jsonl": ('{"text": "a"}\n{"text": "b', "line 2 is not valid JSON"),
    "lines.json": ('\n[{"text": "a"},\n\n{"text": ]', "line 4 is not valid JSON"),
    "item.json": ('[{"text": "a"},\n5]', "item 2 is not a JSON object"),
    "deep.jsonl": ("[" * 100_000, "is not valid JSON"),
    "latin.txt.gz": (gzip.compress(b"fine\nbroken \xff line\n"), "line 2 is not UTF-8"),
    "short.jsonl.gz": (gzip.compress(CONTENTS[".jsonl"].encode() * 9)[:-20], "cannot be read"),
    "short.jsonl.zst": (zst(CONTENTS[".jsonl"].encode() * 9)[:-20], "cannot be read"),
    "short.jsonl.xz": (lzma.compress(CONTENTS[".jsonl"].encode() * 9)[:-20], "cannot be read"),
    "short.jsonl.bz2": (bz2.compress(CONTENTS[".jsonl"].encode() * 9)[:-20], "cannot be read"),
    "none.jsonl.xz": (b"no xz at all", "cannot be read"),
    "none.jsonl.zst": (b"no zst at all", "cannot be read"),
    "none.txt.bz2": (b"no bz2 at all", "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_an_error_with_its_name(name, tmp_path):
    content, words = DAMAGED[name]
    with pytest.raises(InputError, match=rf"{name}.*{words}"):
        list(read_rows(write(tmp_path / name, content), "text"))


def test_damaged_parquet_is_an_error_with_its_name(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"\xffa")]
    )
    pa.parquet.write_table(pa.table({"text": texts}), path)
    with pytest.raises(InputError, match=r"a\.parquet.*utf-8"):
        list(read_rows(str(path), "text"))
    pa.parquet.write_table(pa.table({"words": texts}), path)
    with pytest.raises(InputError, match=r"a\.parquet.*utf-8"):
        find_text_column(str(path), None)
    pa.parquet.write_table(
        pa.table({"text": [str(n) * 50 for n in range(5000)]}), path, compression="snappy", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    data[2000:60_000] = bytes(58_000)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet"):
        list(read_rows(str(path), "text"))


def test_a_large_parquet_file_that_is_not_read_to_its_end_does_not_hang_the_process(tmp_path):
    texts = [str(n) * 300 for n in range(20_000)]
    pa.parquet.write_table(
        pa.table({"text": texts, "other": [text[::-1] for text in texts]}), tmp_path / "a.parquet", row_group_size=2000
    )
    path = str(tmp_path / "a.parquet")
    program = f"from microbert.data.file_formats import read_rows\nprint(len(next(read_rows({path!r}, 'text', 5000))))"
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT
        )
        assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr


def test_a_first_line_that_looks_like_a_row_is_refused(tmp_path):
    for content in (
        "great film,pos\nbad film,neg\nfine film,pos\n",
        "0,it was a film of some kind\n1,and another one\n",
        "this is the first of all rows,1\nand one,2\n",
    ):
        with pytest.raises(InputError, match=r"a\.csv: the first line should name the columns, but looks like a row"):
            find_text_column(write(tmp_path / "a.csv", content), None)
    path = write(tmp_path / "a.csv", "0,it was a film of some kind\n1,and another one\n")
    assert find_text_column(path, "it was a film of some kind") == "it was a film of some kind"


def test_long_questions_and_usual_names_are_a_header(tmp_path):
    assert find_text_column(
        write(tmp_path / "a.csv", "n,How satisfied are you with the service?\n1,not at all\n"), None
    )
    labelled = write(tmp_path / "b.csv", "review,sentiment\n" + "so so,x\n" * 300 + "review,y\n")
    assert find_labelled_columns(labelled, None, None) == ("review", "sentiment")


def test_names_with_dots_in_nested_columns(tmp_path):
    rows = [{"data": [{"a": 1}], "meta": {"a.b": "one", "data": {"text": "two"}}, "c.d": {"e": "three"}}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for table in (path, str(tmp_path / "a.parquet")):
        for column, text in (("meta.a.b", "one"), ("meta.data.text", "two"), ("c.d.e", "three")):
            assert list(read_rows(table, find_text_column(table, column))) == [[text]]


def test_finding_columns_takes_time_proportional_to_the_values(tmp_path):
    rows = [{"text": f"t {n}", "label": n % 2, "meta": {f"k{n}": 1}} for n in range(20_000)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    begin = time.perf_counter()
    assert find_labelled_columns(path, None, None) == ("text", "label")
    assert time.perf_counter() - begin < 20


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match='several columns "text"; it has: text, text'):
        read(write(tmp_path / "a.csv", "text, text\na,b\n"))


def test_fields_of_nested_columns_from_every_row_on(tmp_path):
    rows = [
        {"id": f"doc{number}", "data": {"text": text, "deeper": {"n": number}}} for number, text in enumerate(TEXTS)
    ]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    for table in (path, str(tmp_path / "a.parquet")):
        assert read(table, 2, "data.text") == TEXTS[2:]
        with pytest.raises(InputError, match="set text_column to the one to train on: id, data.text, data.deeper.n"):
            find_text_column(table, None)
        with pytest.raises(InputError, match='no column "data.nope".* it has: id, data.text, data.deeper.n'):
            list(read_rows(table, "data.nope"))


def test_columns_are_listed_in_one_line_whatever_their_names(tmp_path):
    (tmp_path / "a.csv").write_text(
        '"two\nlines",' + ",".join(f"column {number}" for number in range(99)) + "\n" + ",".join("x" * 100) + "\n"
    )
    with pytest.raises(InputError) as caught:
        find_text_column(str(tmp_path / "a.csv"), None)
    assert (
        "two lines, column 0" in str(caught.value) and "50 more" in str(caught.value) and "\n" not in str(caught.value)
    )
