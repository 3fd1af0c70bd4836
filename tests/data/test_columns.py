"""Which column is chosen or refused, and what counts as a text or a label."""

import datetime
import decimal

import pytest

from microbert.data.columns import (
    A_LIST,
    NUMBERS,
    TEXT,
    Column,
    as_label,
    as_text,
    choose_label_column,
    choose_text_column,
    sorted_labels,
)
from microbert.errors import InputError


def choose(names, wanted=None, **values):
    columns = [Column(name, values.pop(f"holds_{name}", TEXT)) for name in names]
    return choose_text_column(columns, wanted, "a.jsonl", lambda name: values.get(name, ["some words in a row"] * 5))


def test_a_column_named_text_wins():
    assert choose(["id", "Text", "body"]) == "Text" and choose([" text", "b"]) == " text"
    assert choose(["text", "b"], "b") == "b" and choose([" b "], "b") == " b " and choose(["b"], " b ") == "b"


@pytest.mark.parametrize(
    "name, values",
    [
        ("id", ["some words in a row"]),
        ("docId", ["a b c"]),
        ("page_url", ["a b c"]),
        ("data.path", ["a b c"]),
        ("created_date", ["Monday the first"]),
        ("author", ["Jane Doe", "John Doe"]),
        ("email", ["write to me"]),
        ("who", ["jane@example.org", "john@example.org"]),
        ("source", ["https://example.org/a b", "https://example.org/b"][1:]),
        ("ref", ["doc00001", "doc00002"]),
        ("v", ["7f3a-9c", "88aa-01"]),
        ("kind", ["film", "book"]),
        ("when", ["2024-01-01 10:00", "2024-01-02 11:00"]),
        ("document", ["doc00001", "doc00002"]),
        ("text2", ["s1", "s2"]),
    ],
)
def test_a_column_of_identifiers_or_addresses_is_not_chosen_silently(name, values):
    message = f'"{name}", seems to hold identifiers or addresses; set text_column to the one to train on: {name}, n'
    with pytest.raises(InputError, match=message):
        choose([name, "n"], holds_n=NUMBERS, **{name: values})
    assert choose([name, "n"], name, holds_n=NUMBERS, **{name: values}) == name


@pytest.mark.parametrize(
    "name, values",
    [
        ("utterances", ["good morning to you", "yes"] * 3),
        ("body", ["x"]),
        ("x", ["ห้องพักสะอาดและเงียบมาก"]),
        ("y", ["房间很干净"]),
        ("read", ["ACGT" * 100]),
        ("sequence", ["ACGTACGT"]),
        ("review", ["fine", "good"]),
    ],
)
def test_the_only_column_of_text_is_chosen(name, values):
    assert choose(["n", name], holds_n=NUMBERS, **{name: values}) == name


def test_a_name_that_looks_like_several_names_is_refused():
    for name in ("text,label", "text::label", "text^label"):
        with pytest.raises(InputError, match="looks like several names"):
            choose([name])
        assert choose([name], name) == name


def test_the_exact_name_wins():
    assert choose(["Text", "text"]) == "text" and choose(["text", "Text "]) == "text"


def test_several_columns_of_text_are_an_error_that_lists_all_names():
    with pytest.raises(InputError, match=r"set text_column to the one to train on: a, data.text, tokens \(a list\)"):
        choose(["a", "data.text", "tokens"], holds_tokens=A_LIST)
    with pytest.raises(InputError, match=r'no column "c"; set text_column to one of: a, b'):
        choose(["a", "b"], "c")


def test_the_label_column_has_a_usual_name_or_the_given_one():
    columns = [Column(name, TEXT) for name in ("text", "class", "stars ")]
    assert choose_label_column(columns, None, "a") == "class" and choose_label_column(columns, "stars", "a") == "stars "
    with pytest.raises(
        InputError, match=r"no column .nope.; set label_column \(--label-column\) to .*: text, class, stars"
    ):
        choose_label_column(columns, "nope", "a")


@pytest.mark.parametrize(
    "value, label",
    [
        ("01", "01"),
        ("None", "None"),
        ("NA", "NA"),
        ("nan", "nan"),
        ("null", "null"),
        (" favour ", "favour"),
        ("", None),
        ("  ", None),
        (None, None),
        (3, "3"),
        (3.0, "3.0"),
        (float("nan"), None),
        (True, "true"),
        (0, "0"),
        (decimal.Decimal("1.50"), "1.50"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
    ],
)
def test_a_label_is_returned_as_written(value, label):
    assert as_label(value, "a", "label", 1) == label


@pytest.mark.parametrize(
    "value, message",
    [(["a", "b"], "only one label per row is supported"), ([], "only one label"), ({"a": 1}, "a text or a number")],
)
def test_several_labels_in_a_row_are_refused(value, message):
    with pytest.raises(InputError, match=rf'a.csv: row 1,234: label column "tags" holds .*{message}'):
        as_label(value, "a.csv", "tags", 1234)


def test_a_value_that_is_no_text_is_refused():
    assert as_text("3", "a", "text", 1) == "3" and as_text(None, "a", "text", 1) is None
    with pytest.raises(InputError, match=r'row 2: column "text" holds \["a", 1\], not text'):
        as_text(["a", 1], "a", "text", 2)


def test_labels_are_sorted_as_numbers_if_all_are_numbers():
    assert sorted_labels(["10", "9", "01", "1", "9", "-2", "1.5", "1e1"]) == ["-2", "01", "1", "1.5", "9", "10", "1e1"]
    assert sorted_labels(["1e99999999999999999999", "5"]) == ["1e99999999999999999999", "5"]
    assert sorted_labels(["10", "9", "nan"]) == ["10", "9", "nan"] and sorted_labels([]) == []
