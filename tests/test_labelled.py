"""Texts with labels come from every place that is promised, and what is wrong with one is told."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from microbert.config import InputError
from microbert.corpus import IMDB_DOCUMENTS
from microbert.labelled import read_labelled

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
        pa.parquet.write_table(pa.table({"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_rows_without_a_text_or_a_label_are_left_out(name, tmp_path):
    found = read(write(tmp_path / name))
    assert found.texts == ["a good film", "a bad film", "the end"]
    assert [found.names[number] for number in found.labels] == ["good", "bad", "bad"] and found.names == ["bad", "good"]


def test_numbers_are_labels_and_columns_may_have_any_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"review": f"text {stars}", "stars": stars}) + "\n" for stars in (1, 5, 3, 5)))
    found = read(path, label_column="stars")
    assert found.names == ["1", "3", "5"] and found.labels.tolist() == [0, 2, 1, 2] and found.texts[1] == "text 5"


def test_the_bundled_reviews_are_half_positive():
    found = read("imdb")
    assert len(found.texts) == IMDB_DOCUMENTS and found.names == ["negative", "positive"]
    assert np.bincount(found.labels).tolist() == [12_500, 12_500]
    assert 400 < found.labels[:1000].sum() < 600  # and not sorted


def test_so_many_samples_are_drawn_by_the_seed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {number}", "label": number % 2}) + "\n" for number in range(100)))
    few = read(path, max_samples=10)
    assert len(few.texts) == 10 and few.texts == read(path, max_samples=10).texts and few.texts != [f"text {number}" for number in range(10)]


@pytest.mark.parametrize("content, options, told", [
    ('{"text": "a", "stars": 1}\n', {}, "--label-column"), ('{"text": "a", "label": 1}\n' * 3, {}, "1 different labels"),
    ('{"a": "x", "b": "y", "label": 1}\n', {}, "set text_column"), ('{"text": "a", "label": 1}\n', {"label_column": "nope"}, "it has: text, label"),
    ('{"text": 5, "label": 1}\n{"text": 6, "label": 2}\n', {"text_column": "text"}, "does not hold text"), ("no json", {}, "cannot be read")])
def test_what_is_wrong_is_told_with_the_columns(content, options, told, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.jsonl", **options)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, told", [("a.txt", "a text file has no labels"), ("missing.csv", "no file that exists")])
def test_what_is_no_table_is_refused(name, told, tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    with pytest.raises(InputError, match=told):
        read(tmp_path / name)
