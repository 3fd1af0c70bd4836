"""Read columns and rows of parquet files and other Arrow tables. Fields of nested columns are named as `data.text`."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from microbert.data.columns import A_LIST, NOTHING, NUMBERS, OTHER, TEXT, Column, choose_text_column, listed
from microbert.data.corpus import READ_ROWS
from microbert.errors import InputError

MAX_DEPTH = 5  # of nested columns


def parquet_columns(file: BinaryIO, where: str) -> tuple[list[Column], Callable[[str], list[object]]] | None:
    """Return the columns of a parquet file, and a function that returns a column's first values; None without rows.

    Reads only the file's footer until that function is called.
    """
    with parquet_errors(where):
        table = _open_parquet(file)
        columns = table_columns(table.schema_arrow)
        return (columns, functools.partial(_first_values, table, where)) if table.metadata.num_rows else None


def parquet_text_column(file: BinaryIO, wanted: str | None, where: str) -> str:
    """Return the column to train on. Raises InputError as `choose_text_column` does."""
    with parquet_errors(where):
        table = _open_parquet(file)
        sample = functools.partial(_first_values, table, where)
        return choose_text_column(table_columns(table.schema_arrow), wanted, where, sample)


def read_parquet(file: BinaryIO, column: str, row: int, where: str) -> Iterator[list[str | None]]:
    """Yield the text column from `row` on, by row group, in the calling thread. Errors of `file` pass through."""
    with parquet_errors(where):
        table = _open_parquet(file)
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


def read_labelled_parquet(
    file: BinaryIO, text_column: str, label_column: str, classes: list[str], where: str
) -> Iterator[tuple[str | None, object]]:
    """Yield text and label of every row. classes: as for `table_labels`."""
    with parquet_errors(where):
        parquet = _open_parquet(file)
        names = _stored_names(parquet.schema_arrow, (text_column, label_column), where)
        for batch in parquet.iter_batches(READ_ROWS, columns=names, use_threads=False):
            table = pa.table(batch).replace_schema_metadata(parquet.schema_arrow.metadata)
            texts, labels = table_rows(table, text_column, where), table_labels(table, label_column, classes, where)
            yield from zip(texts, labels, strict=True)


def table_text_column(table: pa.Table, wanted: str | None, where: str, without: str | None = None) -> str:
    """Return the column to train on.

    table: the first rows. where: the table's name for messages. without: a column to ignore. Raises InputError as
    `choose_text_column` does.
    """
    columns = [column for column in table_columns(table.schema) if column.name != without]
    return choose_text_column(columns, wanted, where, lambda name: _values(table, name, where))


def table_columns(schema: pa.Schema) -> list[Column]:
    """Return the columns of a table, with the fields of nested columns instead of these."""

    def columns(fields: Sequence[pa.Field], prefix: str, depth: int) -> Iterator[Column]:
        for field in fields:
            if pa.types.is_struct(field.type) and depth < MAX_DEPTH:
                yield from columns(list(field.type), f"{prefix}{field.name}.", depth + 1)
            else:
                yield Column(prefix + field.name, _holds(field.type))

    return list(columns(list(schema), "", 1))


def table_rows(table: pa.Table, column: str, where: str) -> list[str | None]:
    """Return the values of the text column. Raises InputError if it is missing or holds anything but text."""
    values = _array(table, column, where)
    if not _is_text(values.type) and not pa.types.is_null(values.type):
        raise InputError(
            f'{where}: column "{column}" holds {values.type}, not text; set text_column to a column with text'
        )
    return values.to_pylist()


def table_labels(table: pa.Table, column: str, classes: list[str], where: str) -> list[object]:
    """Return the values of the label column as Python objects, with the names of classes instead of their numbers.

    classes: these names, if the table itself has none. A number without a name, such as -1, becomes None: no label.
    """
    names = _class_names(table.schema, column) or classes
    values = _values(table, column, where)
    return [class_name(value, names) if isinstance(value, int) else value for value in values] if names else values


def class_name(number: int, names: list[str]) -> str | None:
    """Return the name of a class by its number, None for a number without a name."""
    return names[number] if 0 <= number < len(names) else None


def _class_names(schema: pa.Schema, column: str) -> list[str]:
    """Return the names of a column's classes if `datasets` has written them into the schema, else an empty list."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else []
    except (KeyError, TypeError, ValueError):
        return []


def _open_parquet(file: BinaryIO) -> pa.parquet.ParquetFile:
    """Open a file that is read in the calling thread alone.

    With `pre_buffer`, a thread of Arrow reads it, and may still release it when the interpreter ends: this aborts the
    process ("terminate called without an active exception").
    """
    return pa.parquet.ParquetFile(file, pre_buffer=False)


def _first_values(table: pa.parquet.ParquetFile, where: str, column: str) -> list[object]:
    with parquet_errors(where):
        names = _stored_names(table.schema_arrow, (column,), where)
        batches = table.iter_batches(READ_ROWS, columns=names, use_threads=False)
        return _values(pa.table(next(batches)), column, where) if table.metadata.num_rows else []


def _holds(kind: pa.DataType) -> str:
    if _is_text(kind):
        return TEXT
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return A_LIST
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return NUMBERS
    return NOTHING if pa.types.is_null(kind) else OTHER


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _stored_names(schema: pa.Schema, columns: tuple[str, ...], where: str) -> list[str]:
    """Return the top-level columns that contain the given ones. Raises InputError if one is missing."""
    return list(dict.fromkeys(_path(schema, column, where)[0] for column in columns))


def _values(table: pa.Table, column: str, where: str) -> list[object]:
    """Return the values as Python objects; floats of 16 and 32 bits with their shortest decimal representation."""
    array = _array(table, column, where)
    try:
        values = array.to_pylist()
    except (OverflowError, ValueError) as error:  # such as a date after the year 9999
        raise InputError(f'{where}: a value of column "{column}" is not a valid {array.type}: {error}') from error
    if pa.types.is_float16(array.type) or pa.types.is_float32(array.type):
        return [value if value is None else float(str(np.float32(value))) for value in values]
    return values


def _array(table: pa.Table, column: str, where: str) -> pa.ChunkedArray:
    """Return a column, or a field of a nested one. Raises InputError if it is missing."""
    first, *fields = _path(table.schema, column, where)
    array = table.column(first)
    for field in fields:
        array = pa.compute.struct_field(array, [[each.name for each in array.type].index(field)])
    return array


def _path(schema: pa.Schema, column: str, where: str) -> list[str]:
    """Return the names of a top-level column and of the nested fields in it. Raises InputError if one is missing."""

    def paths(fields: Sequence[pa.Field], wanted: str) -> Iterator[list[str]]:
        for field in fields:
            if field.name == wanted:
                yield [field.name]
            elif pa.types.is_struct(field.type) and wanted.startswith(field.name + "."):
                yield from ([field.name, *rest] for rest in paths(list(field.type), wanted[len(field.name) + 1 :]))

    found = next(paths(list(schema), column), None)
    found = found or next(([name] for name in schema.names if name.strip() == column.strip()), None)
    if found is None:
        raise InputError(f'{where} has no column "{column}"; it has: {listed(table_columns(schema))}')
    if schema.names.count(found[0]) > 1:
        raise InputError(
            f'{where} has several columns "{found[0]}"; rename all but one of them. It has: '
            f"{listed(table_columns(schema))}"
        )
    return found


@contextlib.contextmanager
def parquet_errors(where: str) -> Iterator[None]:
    """Turn errors of a damaged parquet file into InputError."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # an error of the file, not of its content
        raise InputError(f"{where}: cannot be read as parquet: {str(error).splitlines()[0]}") from error
