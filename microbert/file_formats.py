"""A file's rows -- txt, jsonl, csv, parquet, compressed or not -- from any row on, a few rows at a time.

Each format is read by the library made for it, only the wanted columns are looked at, and values stay as they are
written. `datasets.load_dataset` reads these formats too, but guesses the types of all columns from the first rows and
stops at a later row of another type, takes words such as NA for missing values, reads every column of a parquet file,
and can hang a process that leaves one unfinished.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from .columns import (
    A_LIST,
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
from .config import InputError
from .dataset_names import file_kind
from .delimited import SAMPLE_LINES, SEPARATORS, read_delimited, separator_of, usual_separator
from .documents import READ_CHARACTERS, READ_ROWS
from .file_kinds import errors_of_reading, kind_of, open_file

BYTE_ORDER_MARK = "\ufeff"
DEEPEST = 5  # levels of nested columns that are listed
MOST_WORDS_OF_A_NAME = 4  # of a column; a first line with more words is a row


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
            values = _parquet_values(file, path, (text_column, label_column), classes)
        else:
            values = READERS[kind](file, path, (text_column, label_column), True)
            if classes:
                values = (
                    (
                        text,
                        _class_name(int(label), classes)
                        if isinstance(label, str) and label.strip("-").isdecimal()
                        else label,
                    )
                    for text, label in values
                )
        for number, (text, label) in enumerate(values, 1):
            yield as_text(text, path, text_column, number), as_label(label, path, label_column, number)


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
        found = _columns(file, path, kind, [text_column, label_column, "text"], n_rows=None)  # labels may begin late
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
    file: BinaryIO, path: str, kind: str, known: list[str | None], n_rows: int | None = READ_ROWS
) -> tuple[list[Column], Callable[[str], list[object]]] | None:
    """The columns of a table, with a function that returns the first values of one; None where it holds no row.

    known: names that show that a first line is a header. n_rows: rows to look at, None for all.
    """
    if kind == "parquet":
        with _parquet_errors(path):
            table = pa.parquet.ParquetFile(file)
            columns = table_columns(table.schema_arrow)
            return (columns, functools.partial(_first_of_parquet, table, path)) if table.metadata.num_rows else None
    if kind == "csv":
        names, records = read_delimited(_lines(file, path), path)
        rows = list(itertools.islice(records, n_rows))
        if rows and not {name.strip().lower() for name in filter(None, known)} & {name.lower() for name in names}:
            _check_header(names, rows, path)
        values = {name: [row[number] for row in rows] for number, name in enumerate(names)}
    else:
        rows = list(itertools.islice(_json_objects(file, path), n_rows))
        names = list(dict.fromkeys(name for fields in rows for name in _nested_names(fields)))
        values = {name: [_value_at(fields, name) for fields in rows] for name in names}
    return ([Column(name, _holds(values[name], kind)) for name in names], values.__getitem__) if rows else None


def _check_header(names: list[str], rows: Sequence[Sequence[str | None]], path: str) -> None:
    """Raises InputError where the first line of a CSV seems to be a row like the others."""
    looks_like_data = [
        name
        for number, name in enumerate(names)
        if name
        and (_is_number(name) or len(name.split()) > MOST_WORDS_OF_A_NAME or any(row[number] == name for row in rows))
    ]
    if looks_like_data:
        raise InputError(
            f"{path}: the first line should name the columns, and looks like a row "
            f"({looks_like_data[0][:40]!r}). Add a first line such as text,label, or set "
            f"text_column to one of: {listed(Column(name, TEXT) for name in names)}"
        )


def parquet_text_column(file: BinaryIO, wanted: str | None, where: str) -> str:
    """The column to train on. Reads the file's footer, and the first rows where names alone do not tell."""
    with _parquet_errors(where):
        table = pa.parquet.ParquetFile(file, pre_buffer=False)
        return choose_text_column(
            table_columns(table.schema_arrow), wanted, where, functools.partial(_first_of_parquet, table, where)
        )


def table_text_column(table: pa.Table, wanted: str | None, where: str, without: str | None = None) -> str:
    """The column to train on.

    table: the first rows. where: its name in errors. without: a column that it is not. Raises as `choose_text_column`
    does.
    """
    columns = [column for column in table_columns(table.schema) if column.name != without]
    return choose_text_column(columns, wanted, where, lambda name: _table_values(table, name, where))


def read_parquet(file: BinaryIO, column: str, row: int, where: str) -> Iterator[list[str | None]]:
    """By row group, that column alone, in the calling thread. Errors of `file` itself pass as they are."""
    with _parquet_errors(where):
        table = pa.parquet.ParquetFile(file, pre_buffer=False)
        names = _stored_names(table.schema_arrow, (column,), where)
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if row < n_rows:
                for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=names, use_threads=False):
                    if row < len(batch):
                        yield table_rows(pa.table(batch.slice(row)) if row else pa.table(batch), column, where)
                    row = max(0, row - len(batch))
            else:
                row -= n_rows


def table_rows(table: pa.Table, column: str, where: str) -> list[str | None]:
    """The values of the text column. Raises InputError where it is missing or holds anything but text."""
    values = _table_array(table, column, where)
    if not _is_text(values.type) and not pa.types.is_null(values.type):
        raise InputError(f'{where}: text_column "{column}" holds {values.type}, not text')
    return values.to_pylist()


def table_labels(table: pa.Table, column: str, where: str, classes: list[str]) -> list[object]:
    """The values of the label column as Python has them, with the names of classes in place of their numbers.

    classes: these names, where the table itself has none. A number without a name, such as -1, means that a row has no
    label.
    """
    names = class_names(table.schema, column) or classes
    values = _table_values(table, column, where)
    return [_class_name(value, names) if isinstance(value, int) else value for value in values] if names else values


def _class_name(number: int, names: list[str]) -> str | None:
    return names[number] if 0 <= number < len(names) else None


def class_names(schema: pa.Schema, column: str) -> list[str]:
    """What the numbers of a column stand for, where `datasets` has written that into the schema; else none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else []
    except (KeyError, TypeError, ValueError):
        return []


def _parquet_values(
    file: BinaryIO, path: str, columns: tuple[str, str], classes: list[str]
) -> Iterator[tuple[object, object]]:
    """Text and label of every row."""
    text_column, label_column = columns
    with _parquet_errors(path):
        parquet = pa.parquet.ParquetFile(file)
        names = _stored_names(parquet.schema_arrow, columns, path)
        for batch in parquet.iter_batches(READ_ROWS, columns=names, use_threads=False):
            table = pa.table(batch).replace_schema_metadata(parquet.schema_arrow.metadata)
            yield from zip(table_rows(table, text_column, path), table_labels(table, label_column, path, classes))


def _first_of_parquet(table: pa.parquet.ParquetFile, where: str, column: str) -> list[object]:
    batches = table.iter_batches(READ_ROWS, columns=[_stored_name(table.schema_arrow, column)], use_threads=False)
    return _table_values(pa.table(next(batches)), column, where) if table.metadata.num_rows else []


def table_columns(schema: pa.Schema) -> list[Column]:
    """The columns of a table, with the fields of nested ones in their place."""

    def columns(fields: Sequence[pa.Field], prefix: str, depth: int) -> Iterator[Column]:
        for field in fields:
            if pa.types.is_struct(field.type) and depth < DEEPEST:
                yield from columns(list(field.type), f"{prefix}{field.name}.", depth + 1)
            else:
                yield Column(prefix + field.name, _holds_type(field.type))

    return list(columns(list(schema), "", 1))


def _holds_type(kind: pa.DataType) -> str:
    if _is_text(kind):
        return TEXT
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return A_LIST
    return (
        NOTHING
        if pa.types.is_null(kind)
        else NUMBERS
        if pa.types.is_integer(kind) or pa.types.is_floating(kind)
        else OTHER
    )


def _stored_name(schema: pa.Schema, column: str) -> str:
    """Under which name a parquet file has a column that is wanted, outer spaces aside."""
    if column in schema.names:
        return column
    return next((name for name in schema.names if name.strip() == column.strip()), column)


def _stored_names(schema: pa.Schema, columns: tuple[str, ...], where: str) -> list[str]:
    """The same for several. Raises InputError, with the columns that there are, where one is missing."""
    for column in columns:
        _table_array(schema.empty_table(), column, where)
    return [_stored_name(schema, column) for column in columns]


def _table_values(table: pa.Table, column: str, where: str) -> list[object]:
    return _table_array(table, column, where).to_pylist()


def _table_array(table: pa.Table, column: str, where: str) -> pa.ChunkedArray:
    """A column, or the field of a nested one. Raises InputError where there is none."""
    name = _stored_name(table.schema, column)
    first, *fields = [name] if name in table.column_names else name.split(".")
    if first in table.column_names:
        with contextlib.suppress(pa.ArrowException, KeyError):  # no such field
            return pa.compute.struct_field(table.column(first), fields) if fields else table.column(first)
    raise InputError(f'{where} has no column "{column}"; it has: {listed(table_columns(table.schema))}')


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds(values: list[object], kind: str) -> str:
    """What a column with these first values holds; in CSV all is text, and what looks like numbers is taken for
    numbers."""
    filled = [value for value in values if value not in (None, "")]
    if not filled:
        return NOTHING
    if all(isinstance(value, str) for value in filled):
        return NUMBERS if kind == "csv" and all(map(_is_number, filled)) else TEXT
    if any(isinstance(value, list) for value in filled):
        return A_LIST
    return NUMBERS if all(isinstance(value, int | float) for value in filled) else OTHER


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _parquet_errors(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # of the file, not of its content
        raise InputError(f"{where}: cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _lines(file: BinaryIO, path: str) -> Iterator[str]:
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
    parse = (
        functools.partial(json.loads, parse_float=WrittenNumber, parse_int=WrittenNumber) if as_written else json.loads
    )
    lines = ((number, line) for number, line in enumerate(_lines(file, path), 1) if line.strip())
    first_number, first = next(lines, (1, ""))
    if first.lstrip().startswith("["):
        lines = iter([(first_number, first + "".join(line for _, line in lines))])
    elif first:
        lines = itertools.chain([(first_number, first)], lines)
    for number, line in lines:
        try:
            value = parse(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON: {getattr(error, 'msg', error)}") from None
        for fields in value if isinstance(value, list) and number == first_number else [value]:
            if not isinstance(fields, dict):
                raise InputError(f"{path}: line {number} is not a JSON object")
            yield fields


def _json_values(file: BinaryIO, path: str, columns: tuple[str, ...], as_written: bool) -> Iterator[tuple[object, ...]]:
    """The values of each object's columns.

    One may lack a column, but not all that there are, and of a text not all of the first ones.
    """
    unseen, names, number = set(columns), {}, 0  # the columns that no row had so far, and those that rows had
    for number, fields in enumerate(_json_objects(file, path, as_written), 1):
        if unseen:
            names |= dict.fromkeys(_nested_names(fields))
            unseen = {column for column in unseen if not _has(fields, column)}
            if unseen and number == READ_ROWS and not as_written:
                break
        yield tuple(fields[column] if column in fields else _value_at(fields, column) for column in columns)
    if unseen and number:
        raise InputError(
            f'{path} has no column "{min(unseen)}"; it has: {listed(Column(name, OTHER) for name in names)}'
        )


def _value_at(fields: dict[str, object], column: str) -> object:
    """The value of a column, or of a field of a nested one, as in `data.text`; None where an object lacks it."""
    if column in fields:
        return fields[column]
    for name, value in fields.items():
        if name.strip() == column.strip():
            return value
        if isinstance(value, dict) and column.startswith(name + "."):
            return _value_at(value, column[len(name) + 1 :])
    return None


def _has(fields: dict[str, object], column: str) -> bool:
    return column in fields or column.strip() in map(str.strip, _nested_names(fields))


def _nested_names(fields: dict[str, object], depth: int = 1) -> Iterator[str]:
    """The columns of an object, with the fields of nested ones in their place."""
    for name, value in fields.items():
        if isinstance(value, dict) and value and depth < DEEPEST:
            yield from (f"{name}.{inner}" for inner in _nested_names(value, depth + 1))
        else:
            yield name


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
