"""Separated fields: the separator, quotation marks, and errors with their line."""

import csv
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from microbert.data.delimited import detect_separator, read_delimited
from microbert.errors import InputError

FIELDS = st.text(st.sampled_from('ab ,;|\t"\nz'), max_size=8)


def rows_of(text, path="a.csv"):
    names, rows = read_delimited(iter(text.splitlines(keepends=True)), path)
    return names, list(rows)


@pytest.mark.parametrize(
    "separator, path",
    [
        (",", "a.csv"),
        (";", "a.csv"),
        ("|", "a.csv"),
        ("\t", "a.csv"),
        ("\t", "a.tsv.gz"),
        (",", "a.tsv"),
        (";", "A.TSV"),
    ],
)
def test_the_separator_splits_all_lines_equally(separator, path):
    text = "".join(
        separator.join(row) + "\n" for row in [("id", "text", "label"), *[("7", "so, so; or not", "good")] * 3]
    )
    if separator in ",;":
        text = text.replace("so, so; or not", '"so, so; or not"')
    assert rows_of(text, path) == (["id", "text", "label"], [["7", "so, so; or not", "good"]] * 3)


@pytest.mark.parametrize("separator", "^~\x01")
def test_an_unusual_separator_is_detected_if_all_lines_have_it(separator):
    text = "".join(separator.join(row) + "\n" for row in [("text", "label"), ("so, so", "good"), ("it is", "bad")])
    assert rows_of(text) == (["text", "label"], [["so, so", "good"], ["it is", "bad"]])


def test_lines_above_the_header_are_skipped_and_counted():
    assert rows_of("sep=;\n\ntext;label\na, b;good\n") == (["text", "label"], [["a, b", "good"]])
    for separator, path in ((",", "a.csv"), ("\t", "a.tsv")):
        with pytest.raises(InputError, match="line 5 has 3 fields"):
            rows_of(f"\n\ntext{separator}label\na{separator}b\na{separator}b{separator}c\n", path)


@pytest.mark.parametrize("text", ["text\na; b\nc\n", "text\nno separator at all\n", "text\n", "what is it?\nis it?\n"])
def test_one_column_needs_no_separator(text):
    assert rows_of(text)[0] == [text.splitlines()[0]]


def test_a_separator_in_few_rows_and_a_row_with_too_many_fields_are_errors():
    message = "a.csv: cannot detect what separates its fields: most lines have another number of semicolons"
    with pytest.raises(InputError, match=message):
        rows_of("text;label\none of them\ntwo of them\nfour;bad\n")
    with pytest.raises(InputError, match="line 3 has 4 fields, but the header names 2 columns"):
        rows_of("text;label\nsix;bad\none; two; three;good\nfour;bad\nfive;bad\n")


@pytest.mark.parametrize("separator", ",;|\t")
def test_short_rows_blank_lines_footers_and_empty_columns_at_the_end_are_accepted(separator):
    text = "text;label\na;x\n   \nb\nc;y;;\nd;x\nTotal: 2\n".replace(";", separator)
    rows = [row for row in rows_of(text)[1] if (row[0] or "").strip()]
    assert rows == [["a", "x"], ["b", None], ["c", "y"], ["d", "x"], ["Total: 2", None]]
    assert rows_of("text;label\n".replace(";", separator)) == (["text", "label"], [])


def test_a_first_field_longer_than_the_sample_is_read():
    field = "\n".join(f"line {number}" for number in range(300))
    assert rows_of(f'text;label\n"{field}";good\nb;bad\n')[1] == [[field, "good"], ["b", "bad"]]


@pytest.mark.parametrize(
    "text",
    [
        "हिन्दी\nअच्छी 1\nगन्दी 2\n",
        "text/plain\nsee a/b here\nw/o\n",
        "ข้อ\nข้อ หนึ่ง\n",
        "Comment:\nGood: x\nBad: y\n",
        "Tweet #1\nhi #one\n",
    ],
)
def test_other_punctuation_and_letters_are_not_separators(text):
    first, *rest = text.splitlines()
    assert rows_of(text) == ([first], [[line] for line in rest])


def test_a_carriage_return_inside_a_field_is_an_error():
    with pytest.raises(InputError, match=r"near line 1: a field contains a carriage return \(CR\)"):
        read_delimited(iter(["text;label\n", "a\rb;x\n", "c;y\n"]), "a.csv")


def test_the_usual_separator_wins_if_several_fit():
    assert detect_separator(["a,b;c\n", "1,2;3\n"], "a.csv") == ","
    assert detect_separator(["a;b,c\n", "1;2,3\n"], "a.tsv") == ","


def test_names_and_quoted_fields_may_have_spaces_before_them():
    assert rows_of('id, text , label\n1, "a, b", good\n') == (["id", "text", "label"], [["1", "a, b", "good"]])


def test_short_rows_are_padded_long_ones_refused_and_empty_ones_skipped():
    assert rows_of("a,b,c\n1\n\n1,2,3\n")[1] == [["1", None, None], ["1", "2", "3"]]
    with pytest.raises(InputError, match="line 3 has 3 fields, but the header names 2 columns"):
        rows_of("a,b\n1,2\n1,2,3\n")


INCHES = [f"screen number {number},good\n" for number in range(30)]


@pytest.mark.parametrize(
    "lines, message",
    [
        ({10: '"12 inches,good\n'}, "line 12"),  # never closes
        ({10: '"12 inches,good\n', 20: '"15 inches,good\n'}, "line 12"),  # closes in the middle of another field
        ({10: '"12 inches,good\n', 20: 'it has 15",good\n'}, "line 12.* looks like a row"),
    ],
)  # closes where a field may end
def test_a_stray_quotation_mark_in_csv_is_an_error_with_its_line(lines, message):
    text = "text,label\n" + "".join(lines.get(number, line) for number, line in enumerate(INCHES))
    with pytest.raises(InputError, match=message):
        rows_of(text)


@pytest.mark.parametrize(
    "text",
    [
        'id,text,label\n1,"12 inches,x\n2,foo,y\n3,bar,x\n4,it has 15",x\n5,q,y\n',
        'id,text,label\n1,"12 inches,x\n2,foo,y\n4,it has 15",x\n5,q,y\n',
        'text,label\n"12 inches,x\nfoo,y\nbar,y\nit has 15",x\nq,y\n',
    ],
)
def test_a_field_that_swallows_a_few_rows_is_an_error(text):
    with pytest.raises(InputError, match="line 2: a quotation mark opens a field"):
        rows_of(text)


@pytest.mark.parametrize(
    "field",
    [
        "\n".join(f"Place {n}, Land {n}" for n in range(9)),
        "x = h(a, b)\ny = h(a, c)\nreturn (x, y)",
        "Roses, red\nViolets, blue\nSugar, sweet",
    ],
)
def test_verse_and_code_in_a_quoted_field_are_not_rows(field):
    assert rows_of(f'text,label\n"{field}",good\nb,bad\n')[1] == [[field, "good"], ["b", "bad"]]


def test_a_quoted_field_may_have_many_lines():
    poem = "\n".join(f"line {number} of it" for number in range(50))
    assert rows_of(f'text,label\n"{poem}",good\n')[1] == [[poem, "good"]]


@pytest.mark.parametrize(
    "field", ['"12 inches', '12"', '"so" it said', 'it said "so"', '"', '""', '" "', 'a "" b', '"whole"']
)
def test_a_quotation_mark_in_tsv_is_an_ordinary_character(field):
    rows = [["1", field, "good"], ["2", "next", "bad"]]
    text = "id\ttext\tlabel\n" + "".join("\t".join(row) + "\n" for row in rows)
    read = rows_of(text, "a.tsv")[1]
    assert read[1] == rows[1] and read[0] in ([rows[0]] if field != '""' else [rows[0], ["1", "", "good"]])


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_quoted_fields_of_pandas_and_excel_in_tsv_are_unquoted(quoting):
    rows = [
        ["1", 'she said "so"', "good"],
        ["2", "a\ttab", "bad"],
        ["3", "two\nlines\n\nand more", "good"],
        ["4", "plain", "bad"],
    ]
    file = io.StringIO()
    csv.writer(file, delimiter="\t", quoting=quoting, lineterminator="\n").writerows([["id", "text", "label"], *rows])
    assert rows_of(file.getvalue(), "a.tsv") == (["id", "text", "label"], rows)


def test_an_unclosed_field_in_tsv_is_an_error_with_its_line():
    with pytest.raises(InputError, match="line 3: a quotation mark opens a field here that is not closed"):
        rows_of('text\tlabel\na\tb\n"open\nc\td\n', "a.tsv")


def test_wrong_quoting_in_a_quoted_tsv_is_an_error_with_its_line():
    with pytest.raises(InputError, match="line 2: .*: double the quotation marks inside a field"):
        rows_of('"text"\t"label"\n"he said \\"hi\\" to me"\t"pos"\n"plain"\t"pos"\n', "a.tsv")


def test_a_short_row_of_tsv_that_begins_with_a_quotation_is_a_row():
    rows = [['"quoted" start', "x", None], ["plain", "y", None]]
    assert rows_of('text\tlabel\tnote\n"quoted" start\tx\nplain\ty\n', "a.tsv")[1] == rows
    with pytest.raises(InputError, match="line 2: .* before the next row"):
        rows_of('id\ttext\tlabel\n1\t"12 inches\n2\tfoo\tgood\n3\tbar"\tbad\n4\tx\tgood\n', "a.tsv")


@example([[",,\n,", "\n,", ""]])  # each of its lines looks like a row
@given(st.lists(st.lists(FIELDS, min_size=3, max_size=3), min_size=1, max_size=6))
def test_rows_written_by_the_csv_module_are_read_back(rows):
    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([["a", "b", "c"], *rows])
    assert rows_of(file.getvalue())[1] == rows
