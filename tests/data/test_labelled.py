"""Texts with labels from every supported source, and the errors of unusable ones."""

import csv
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from microbert.data.file_formats import read_labelled_rows
from microbert.data.labelled import read_labelled
from microbert.data.sources import IMDB_DOCUMENTS
from microbert.errors import InputError

ROWS = [("a good film", "good"), ("a bad film", "bad"), ("", "good"), ("no label", None), ("the end", "bad")]


def read(path, text_column=None, label_column=None, max_samples=None):
    return read_labelled(str(path), text_column, label_column, max_samples, seed=1)


def write(path):
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS))
    elif kind in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter="\t" if kind == ".tsv" else ",").writerows([("text", "label"), *ROWS])
    else:
        pa.parquet.write_table(
            pa.table({"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}), path
        )
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_rows_without_a_text_or_a_label_are_skipped(name, tmp_path):
    found = read(write(tmp_path / name))
    assert str(found.source).endswith(
        '(text column "text", label column "label"): 5 rows, 3 used; skipped: 1 without a text, 1 without a label'
    )
    assert found.texts == ["a good film", "a bad film", "the end"]
    assert [found.names[number] for number in found.labels] == ["good", "bad", "bad"] and found.names == ["bad", "good"]


def test_numbers_are_labels_and_columns_may_have_any_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"review": f"text {stars}", "stars": stars}) + "\n" for stars in (1, 5, 3, 5)))
    found = read(path, label_column="stars")
    assert found.names == ["1", "3", "5"] and found.labels.tolist() == [0, 2, 1, 2] and found.texts[1] == "text 5"


WRITTEN = ["01", "1", "10", "None", "NA", "nan", "null", " favour ", "3", "3.0", "3.10", "1e3", "-0", "true"]
AS_CLASSES = ["-0", "01", "1", "10", "1e3", "3", "3.0", "3.10", "NA", "None", "favour", "nan", "null", "true"]


def write_labels(path, labels):
    """Write texts with these labels to a file of the format in its name."""
    texts = [f"text {number}" for number in range(len(labels))]
    if path.suffix == ".jsonl":
        path.write_text(
            "".join(
                json.dumps({"text": text, "label": label}) + "\n" for text, label in zip(texts, labels, strict=True)
            )
        )
    elif path.suffix == ".parquet":
        pa.parquet.write_table(pa.table({"text": texts, "label": labels}), path)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(
                [("text", "label"), *zip(texts, labels, strict=True)]
            )
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_labels_are_returned_as_written_in_every_format(name, tmp_path):
    found = read(write_labels(tmp_path / name, WRITTEN))
    assert found.names == AS_CLASSES
    assert [found.names[number] for number in found.labels] == [label.strip() for label in WRITTEN]


def test_numbers_stay_as_written_even_if_some_rows_lack_one(tmp_path):
    values = ["3", "null", "3.10", "10", "9", "NaN", "1e3", "-0", "Infinity", "true", "false"]
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "text {number}", "label": {value}}}\n' for number, value in enumerate(values))
        + '{"text": "no label"}\n'
    )
    found = read(tmp_path / "a.jsonl")
    assert [found.names[number] for number in found.labels] == [
        "3",
        "3.10",
        "10",
        "9",
        "1e3",
        "-0",
        "Infinity",
        "true",
        "false",
    ]
    assert found.source.without_label == 3
    pa.parquet.write_table(
        pa.table({"text": list("abcd"), "label": pa.array([3, None, 10, 9], pa.int64())}), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.parquet").names == ["3", "9", "10"]  # in the order of numbers


def test_a_file_that_replaces_another_with_the_same_time_is_read_again(tmp_path):
    first = read(write_labels(tmp_path / "a.csv", ["x", "y", "z"]))
    time = (tmp_path / "a.csv").stat().st_mtime_ns
    write_labels(tmp_path / "a.csv", ["y", "z", "x"])
    os.utime(tmp_path / "a.csv", ns=(time, time))
    assert first.labels.tolist() == [0, 1, 2] and read(tmp_path / "a.csv").labels.tolist() == [1, 2, 0]


def test_the_class_names_in_a_parquet_file_are_its_labels(tmp_path):
    features = {"info": {"features": {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}
    table = pa.table({"text": list("abcd"), "label": [1, 0, -1, 1]}).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found.names == ["bad", "good"] and found.labels.tolist() == [1, 0, 1] and found.source.without_label == 1


def test_a_text_label_is_unchanged_if_class_names_are_numbers(tmp_path):
    classes, ones = list("12345"), "1" * 4000
    for value, label in (
        ('"1"', "1"),
        ("1", "2"),
        ('"5"', "5"),
        ("5", None),
        ("-1", None),
        ('"1-"', "1-"),
        (ones, ones),
    ):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "t", "label": {value}}}\n')
        assert list(read_labelled_rows(str(tmp_path / "a.jsonl"), "text", "label", classes)) == [("t", label)]
    (tmp_path / "a.csv").write_text("text,label\nt,1\n")
    assert list(read_labelled_rows(str(tmp_path / "a.csv"), "text", "label", classes)) == [("t", "2")]


def test_labels_of_every_type_of_parquet(tmp_path):
    def labels(array):
        pa.parquet.write_table(pa.table({"text": list("ab"), "label": array}), tmp_path / "a.parquet")
        return [label for _, label in read_labelled_rows(str(tmp_path / "a.parquet"), "text", "label", [])]

    assert labels(pa.array([0.1, None], pa.float32())) == ["0.1", None]
    assert labels(pa.array([0.5, 3.0])) == ["0.5", "3.0"] and labels(pa.array([True, False])) == ["true", "false"]
    assert labels(pa.array(["01", "NA"]).dictionary_encode()) == ["01", "NA"]
    with pytest.raises(InputError, match=r'column "label" is not a valid timestamp'):
        labels(pa.array([2**60, 0], pa.timestamp("us")))


def test_text_files_beside_a_table_are_skipped_and_named(tmp_path):
    write_labels(tmp_path / "train.csv", ["x", "y"])
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    (tmp_path / "_SUCCESS").write_text("")
    found = read(tmp_path)
    message = found.source.description
    assert found.names == ["x", "y"] and "vocab.txt" in message and "_SUCCESS" in message


def test_late_rows_may_look_different(tmp_path):
    rows = [{"text": f"text {number}", "meta": None} for number in range(500)] + [
        {"text": f"late {label}", "label": label, "meta": {"a": [1]}} for label in (1, "one", 2)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(tmp_path / "a.jsonl")
    assert found.names == ["1", "2", "one"] and found.source.without_label == 500


def test_nested_columns_are_named_with_dots(tmp_path):
    rows = [
        {"id": f"d{number}", "data": {"text": f"text {number}", "meta": {"stars": number % 2}}} for number in range(4)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        found = read(tmp_path / name, "data.text", "data.meta.stars")
        assert found.texts == ["text 0", "text 1", "text 2", "text 3"] and found.labels.tolist() == [0, 1, 0, 1]


def test_files_without_rows_before_the_first_one_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    write_labels(tmp_path / "b.jsonl", ["x", "y"])
    (tmp_path / "notes.md").write_text("no table")
    found = read(tmp_path)
    assert found.names == ["x", "y"] and "1 of unsupported formats (" in found.source.description


def test_the_bundled_reviews_are_half_positive():
    found = read("imdb")
    assert len(found.texts) == IMDB_DOCUMENTS and found.names == ["negative", "positive"]
    assert np.bincount(found.labels).tolist() == [12_500, 12_500]
    assert 400 < found.labels[:1000].sum() < 600  # and not sorted


def test_max_samples_draws_a_sample_by_the_seed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"text {number}", "label": number % 2}) + "\n" for number in range(100))
    )
    few = read(path, max_samples=10)
    assert (
        len(few.texts) == 10
        and few.texts == read(path, max_samples=10).texts
        and few.texts != [f"text {number}" for number in range(10)]
    )


@pytest.mark.parametrize(
    "content, options, message",
    [
        ('{"text": "a", "stars": 1}\n', {}, "--label-column"),
        ('{"text": "a", "label": 1}\n' * 3, {}, "1 distinct label,"),
        ('{"a": "x", "b": "y", "label": 1}\n', {}, "set text_column"),
        (
            '{"text": "a", "label": 1}\n',
            {"label_column": "nope"},
            'no column "nope"; set label_column (--label-column) to the one with the labels: text, label',
        ),
        ('{"text": 5, "label": 1}\n{"text": 6, "label": 2}\n', {"text_column": "text"}, "holds 5, not text"),
        ("no json", {}, "line 1 is not valid JSON"),
        ('{"text": "a", "label": ["x"]}\n', {}, 'label column "label" holds ["x"]'),
    ],
)
def test_errors_name_the_columns(content, options, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.jsonl", **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, message", [("a.txt", "a text file has no labels"), ("missing.csv", "no such file")])
def test_a_text_file_or_a_missing_file_is_refused(name, message, tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)
