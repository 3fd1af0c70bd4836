"""A file's rows -- txt, jsonl, csv, parquet, compressed or not -- from any row on, a few rows at a time.

Each format is read by the library made for it, only the wanted columns are looked at, and values stay as they are
written. `datasets.load_dataset` reads these formats too, but guesses the types of all columns from the first rows and
stops at a later row of another type, takes words such as NA for missing values, reads every column of a parquet file,
and can hang a process that leaves one unfinished.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from microbert.config.dataset_names import file_kind
from microbert.data.columns import (
    A_LIST,
    LABEL_COLUMNS,
    NOTHING,
    NUMBERS,
    OTHER,
    TEXT,
    Column,
    WrittenNumber,
    as_label,
    as_text,
    choose_label_column,
    choose_text_column,
    listed,
)
from microbert.data.corpus import READ_CHARACTERS, READ_ROWS
from microbert.data.delimited import (
    SAMPLE_LINES,
    SAVE_WITH_LF,
    SEPARATORS,
    read_delimited,
    separator_of,
    usual_separator,
)
from microbert.data.file_kinds import HEAD_BYTES, errors_of_reading, kind_of, open_file
from microbert.data.tables import DEEPEST, class_name, parquet_columns, read_labelled_parquet, read_parquet
from microbert.errors import InputError

BYTE_ORDER_MARK = "\ufeff"
MOST_WORDS_OF_A_NAME = 4  # of a column; a first line with more words is a row
CLASS_NUMBER = re.compile(r"-?\d{1,9}", re.ASCII)
MISSING = object()


def read_rows(path: str, column: str, row: int = 0) -> Iterator[list[str | None]]:
    """The text column from `row` on, some rows at a time; None where a row has none.

    A row of a text file is a line, whatever the column. Raises InputError, with the line where there are lines, for
    what cannot be read.
    """
    with errors_of_reading(path), open_file(path) as file:
        if (kind := kind_of(path, file)) == "parquet":
            yield from read_parquet(file, column, row, path)
        else:
            values = READERS[kind](file, path, (column,), False)
            texts = (as_text(value, path, column, number) for number, (value,) in enumerate(values, 1))
            yield from _in_batches(itertools.islice(texts, row, None))


def read_labelled_rows(
    path: str, text_column: str, label_column: str, classes: list[str]
) -> Iterator[tuple[str | None, str | None]]:
    """Text and label of every row, None where a row lacks one.

    classes: what numbers 0, 1, ... of the label column stand for, where that is known. Raises InputError as `read_rows`
    does, and for a row with several labels.
    """
    with errors_of_reading(path), open_file(path) as file:
        if (kind := kind_of(path, file)) == "parquet":
            values = read_labelled_parquet(file, text_column, label_column, classes, path)
        elif kind == "text":
            raise InputError(f"{path}: a text file has no labels: give csv, jsonl or parquet files")
        else:
            values = READERS[kind](file, path, (text_column, label_column), True)
            if classes:
                values = ((text, _as_class(label, kind, classes)) for text, label in values)
        for number, (text, label) in enumerate(values, 1):
            yield as_text(text, path, text_column, number), as_label(label, path, label_column, number)


def _as_class(label: object, kind: str, classes: list[str]) -> object:
    """The name of the class that a number stands for.

    In JSON a text is a label as it is; CSV has no numbers but texts.
    """
    is_number = isinstance(label, WrittenNumber) or (kind == "csv" and isinstance(label, str))
    return class_name(int(label), classes) if is_number and CLASS_NUMBER.fullmatch(label) else label


def find_text_column(path: str, wanted: str | None) -> str | None:
    """The column to train on, None where the file holds no row.

    Raises InputError with the columns' names where it cannot be told.
    """
    with errors_of_reading(path), open_file(path) as file:
        if (kind := kind_of(path, file)) == "text":
            return "text" if any(True for _ in file) else None
        found = _columns(file, path, kind, [wanted, "text"])
        return found and choose_text_column(found[0], wanted, path, found[1])


def find_labelled_columns(path: str, text_column: str | None, label_column: str | None) -> tuple[str, str] | None:
    """The columns with texts and labels, None where the file holds no row.

    Raises InputError where they cannot be told, and for a text file.
    """
    with errors_of_reading(path), open_file(path) as file:
        if (kind := kind_of(path, file)) == "text":
            raise InputError(f"{path}: a text file has no labels: give csv, jsonl or parquet files")
        known = [text_column, label_column, "text", *LABEL_COLUMNS]
        found = _columns(file, path, kind, known, n_objects=None)  # labels may begin late
        if found is None:
            return None
        columns, sample = found
        label = choose_label_column(columns, label_column, path)
        return choose_text_column(
            [column for column in columns if column.name != label], text_column, path, sample
        ), label


def describe_column(path: str, column: str) -> str:
    """Where the documents of a file are, in words for people: its column, and the separator where that is not the
    usual one."""
    with errors_of_reading(path), open_file(path) as file:
        if (kind := kind_of(path, file)) == "text":
            return "one document a line"
        separator = (
            separator_of(list(itertools.islice(_lines(file, path), SAMPLE_LINES)), path)
            if kind == "csv"
            else usual_separator(path)
        )
    return f'text column "{column}"' + (
        f", separated by {SEPARATORS.get(separator, repr(separator))}" if separator != usual_separator(path) else ""
    )


def reading_of(path: str) -> tuple[str | None, str]:
    """What a file's name, rather than its content, decides about how it is read: its format and the separator to try
    first."""
    return file_kind(path), usual_separator(path)


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _columns(
    file: BinaryIO, path: str, kind: str, known: list[str | None], n_objects: int | None = READ_ROWS
) -> tuple[list[Column], Callable[[str], list[object]]] | None:
    """The columns of a table, with a function that returns the first values of one; None where it holds no row.

    known: names that show that a first line is a header. n_objects: objects of JSON to look at, None for all.
    """
    if kind == "parquet":
        return parquet_columns(file, path)
    values: dict[str, list[object]] = {}
    if kind == "csv":
        names, records = read_delimited(_lines(file, path), path)
        rows = list(itertools.islice(records, READ_ROWS))
        if rows and not {name.strip().lower() for name in filter(None, known)} & {name.lower() for name in names}:
            _check_header(names, rows, path)
        values = {name: [row[number] for row in rows] for number, name in enumerate(names)} if rows else {}
        columns = [Column(name, _holds_in_csv(name, values[name])) for name in values]
    else:
        holds: dict[str, set[str]] = {}
        for number, fields in enumerate(itertools.islice(_json_objects(file, path), n_objects)):
            for name, value in _nested_values(fields):
                holds.setdefault(name, set()).add(_holds(value))
                if number < READ_ROWS:
                    values.setdefault(name, []).append(value)
        columns = [Column(name, _holds_of_all(kinds)) for name, kinds in holds.items()]
    return (columns, lambda name: values.get(name, [])) if columns else None


def _check_header(names: list[str], rows: Sequence[Sequence[str | None]], path: str) -> None:
    """Raises InputError where the first line of a CSV seems to be a row like the others."""
    looks_like_data = [
        name
        for number, name in enumerate(names)
        if name and (_is_number(name) or _is_sentence(name) or any(row[number] == name for row in rows))
    ]
    if looks_like_data:
        raise InputError(
            f"{path}: the first line should name the columns, and looks like a row "
            f"({looks_like_data[0][:40]!r}). Add a first line such as text,label; or, if these "
            f"are names, set text_column to one of them: {listed(Column(name, TEXT) for name in names)}"
        )


def _is_sentence(name: str) -> bool:
    """Whether a name is too long for one, and no question of a survey."""
    return len(name.split()) > MOST_WORDS_OF_A_NAME and not name.endswith(("?", ":"))


def _holds(value: object) -> str:
    if value is None or value == "":
        return NOTHING
    if isinstance(value, str):
        return TEXT
    return A_LIST if isinstance(value, list) else NUMBERS if isinstance(value, int | float) else OTHER


def _holds_of_all(kinds: set[str]) -> str:
    """What a column holds, by what its values are."""
    filled = kinds - {NOTHING}
    return next(iter(filled or kinds)) if len(filled) < 2 else A_LIST if A_LIST in filled else OTHER


def _holds_in_csv(name: str, values: list[str | None]) -> str:
    """The same for a column in which all is text: what looks like numbers is taken for numbers, unless it is called
    text."""
    filled = [value for value in values if value]
    is_text = name.lower() == "text" or not all(map(_is_number, filled))
    return NOTHING if not filled else TEXT if is_text else NUMBERS


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _lines(file: BinaryIO, path: str) -> Iterator[str]:
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
    if b"\r" in head[:-1] and b"\n" not in head and len(head) < HEAD_BYTES:
        raise InputError(f"{path}: its lines end with a carriage return (CR) alone. {SAVE_WITH_LF}")
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: line {number} is not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8"
            ) from None
        yield text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text


def _text_values(file: BinaryIO, path: str, columns: tuple[str, ...], as_written: bool) -> Iterator[tuple[str]]:
    """Lines without their ends; a text file has one column, whatever its name."""
    return ((line.rstrip("\r\n"),) for line in _lines(file, path))


def _json_objects(file: BinaryIO, path: str, as_written: bool = False) -> Iterator[dict[str, object]]:
    """One object a line; or the objects of an array, all of which is then read at once.

    as_written: numbers are WrittenNumber.
    """
    written = {"parse_float": WrittenNumber, "parse_int": WrittenNumber, "parse_constant": WrittenNumber}
    parse = functools.partial(json.loads, **written) if as_written else json.loads
    lines = enumerate(_lines(file, path), 1)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    is_array = first[1].lstrip().startswith("[")
    if is_array:
        lines = iter([(first[0], first[1] + "".join(line for _, line in lines))])
    else:
        lines = itertools.chain([first], lines)
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = parse(line)
        except (ValueError, RecursionError) as error:
            number += getattr(error, "lineno", 1) - 1
            raise InputError(f"{path}: line {number} is not JSON: {getattr(error, 'msg', error)}") from None
        for item, fields in enumerate(value if is_array and isinstance(value, list) else [value], 1):
            if not isinstance(fields, dict):
                raise InputError(f"{path}: {f'item {item:,}' if is_array else f'line {number}'} is not a JSON object")
            yield fields


def _json_values(file: BinaryIO, path: str, columns: tuple[str, ...], as_written: bool) -> Iterator[tuple[object, ...]]:
    """The values of each object's columns.

    One may lack a column, but not all that there are, and of a text not all of the first ones.
    """
    unseen, names, number = set(columns), {}, 0  # the columns that no row had so far, and those that rows had
    for number, fields in enumerate(_json_objects(file, path, as_written), 1):
        if unseen:
            names |= dict.fromkeys(name for name, _ in _nested_values(fields))
            unseen = {column for column in unseen if not _has(fields, column)}
            if unseen and number == READ_ROWS and not as_written:
                break
        yield tuple(fields[column] if column in fields else _value_at(fields, column) for column in columns)
    if unseen and number:
        raise InputError(
            f'{path} has no column "{min(unseen)}"; it has: {listed(Column(name, TEXT) for name in names)}'
        )


def _value_at(fields: dict[str, object], column: str) -> object:
    """The value of a column, or of a field of a nested one, as in `data.text`; None where an object lacks it."""
    return next(_found(fields, column), None)


def _has(fields: dict[str, object], column: str) -> bool:
    return next(_found(fields, column), MISSING) is not MISSING


def _found(fields: dict[str, object], column: str) -> Iterator[object]:
    """The values under a name, outer spaces aside: names of nested columns may have points themselves."""
    if column in fields:
        yield fields[column]
    for name, value in fields.items():
        if name != column and name.strip() == column.strip():
            yield value
        elif isinstance(value, dict) and column.startswith(name + "."):
            yield from _found(value, column[len(name) + 1 :])


def _nested_values(fields: dict[str, object], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, object]]:
    """The columns of an object and their values, with the fields of nested ones in their place."""
    for name, value in fields.items():
        if isinstance(value, dict) and value and depth < DEEPEST:
            yield from _nested_values(value, f"{prefix}{name}.", depth + 1)
        else:
            yield prefix + name, value


def _csv_values(
    file: BinaryIO, path: str, columns: tuple[str, ...], as_written: bool
) -> Iterator[tuple[str | None, ...]]:
    names, records = read_delimited(_lines(file, path), path)
    first = next(records, None)
    if first is None:
        return
    for column in columns:
        if names.count(column.strip()) != 1:
            problem = f'has several columns "{column}"' if column.strip() in names else f'has no column "{column}"'
            raise InputError(f"{path} {problem}; it has: {listed(Column(name, TEXT) for name in names)}")
    numbers = [names.index(column.strip()) for column in columns]
    for record in itertools.chain([first], records):
        yield tuple(record[number] for number in numbers)


# (file, path for errors, columns, whether numbers stay as written) -> the values of each row
READERS: dict[str, Callable[[BinaryIO, str, tuple[str, ...], bool], Iterator[tuple[object, ...]]]] = {
    "text": _text_values,
    "json": _json_values,
    "csv": _csv_values,
}


def _in_batches(rows: Iterator[str | None]) -> Iterator[list[str | None]]:
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += len(row) if row else 0
        if len(batch) == READ_ROWS or characters >= READ_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
