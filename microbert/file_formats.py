"""A file's rows as text -- txt, jsonl, csv, parquet, compressed or not -- from any row on, a few rows at a time.

Each format goes through the library that is made for it, and only the text column is looked at. `datasets.load_dataset` reads them too, but
guesses the types of all columns from the first rows and stops at a later row of another type, takes words such as NA for nothing, reads every
column of a parquet file, and can hang a process that leaves one unfinished.
"""

import bz2
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet

from .config import InputError
from .dataset_names import file_kind
from .documents import READ_CHARACTERS, READ_ROWS

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)  # what a damaged compressed file raises
MOST_NAMES, LONGEST_NAME = 50, 80  # of columns in an error; characters
BYTE_ORDER_MARK = "\ufeff"


def read_rows(path: str, column: str, row: int = 0) -> Iterator[list[str | None]]:
    """The text column from `row` on, some rows at a time; None where a row has none. A row of a text file is a line, whatever the column.

    Raises InputError, with the line where there are lines, for what cannot be read.
    """
    kind = file_kind(path)
    with _errors_of(path), _open(path) as file:
        if kind == "parquet":
            yield from read_parquet(file, column, row, path)
        else:
            yield from _in_batches(itertools.islice(READERS[kind](file, path, column), row, None))


def find_text_column(path: str, wanted: str | None) -> str | None:
    """The column to train on, None where the file holds no row. Raises InputError with the columns' names where it cannot be told."""
    kind = file_kind(path)
    with _errors_of(path), _open(path) as file:
        if kind == "parquet":
            with _parquet_errors(path):
                is_empty = not pa.parquet.ParquetFile(file).metadata.num_rows
            return None if is_empty else parquet_text_column(file, wanted, path)
        if kind == "text":
            return "text" if any(True for _ in file) else None
        rows = list(itertools.islice(_json_objects(file, path) if kind == "json" else _csv_objects(file, path), READ_ROWS))
    if not rows:
        return None
    names = list(dict.fromkeys(name for fields in rows for name in fields))
    texts = [name for name in names if _holds_text([fields.get(name) for fields in rows], is_csv=kind == "csv")]
    return choose_text_column(names, texts, wanted, path)


def choose_text_column(names: list[str], texts: list[str], wanted: str | None, where: str) -> str:
    """The wanted column, else "text", else the only one that holds text. names: all columns; texts: those that hold text.

    Raises InputError with all columns' names.
    """
    if wanted is not None and wanted not in names:
        raise InputError(f'{where} has no column "{wanted}" (text_column); it has: {listed(names)}')
    if wanted is None and "text" not in texts and len(texts) != 1:
        raise InputError(f"{where}: set text_column to the column to train on; it has: {listed(names)}")
    return wanted or ("text" if "text" in texts else texts[0])


def listed(names: Iterable[str]) -> str:
    """Columns' names in a line for people, whatever is in them and however many there are."""
    names = [" ".join(name.split())[:LONGEST_NAME] for name in names]
    return ", ".join(names[:MOST_NAMES]) + f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)


def parquet_text_column(file: BinaryIO, wanted: str | None, where: str) -> str:
    """The column to train on, from the file's footer."""
    with _parquet_errors(where):
        return table_text_column(pa.parquet.ParquetFile(file).schema_arrow, wanted, where)


def table_text_column(schema: pa.Schema, wanted: str | None, where: str) -> str:
    """The column to train on. where: the table's name in errors. Raises as `choose_text_column` does."""
    return choose_text_column(schema.names, [field.name for field in schema if _is_text(field.type)], wanted, where)


def read_parquet(file: BinaryIO, column: str, row: int, where: str) -> Iterator[list[str | None]]:
    """By row group, that column alone, in the calling thread. Errors of `file` itself pass as they are."""
    with _parquet_errors(where):
        table = pa.parquet.ParquetFile(file, pre_buffer=False)
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if row < n_rows:
                for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=[column], use_threads=False):
                    if row < len(batch):
                        yield table_rows(pa.table(batch.slice(row)) if row else pa.table(batch), column, where)
                    row = max(0, row - len(batch))
            else:
                row -= n_rows


def table_rows(table: pa.Table, column: str, where: str) -> list[str | None]:
    """The values of the text column. Raises InputError where it is missing or holds anything but text."""
    if column not in table.column_names:
        raise InputError(f'{where} has no column "{column}"; it has: {listed(table.column_names)}')
    values = table.column(column)
    if not _is_text(values.type) and not pa.types.is_null(values.type):
        raise InputError(f'{where}: text_column "{column}" holds {values.type}, not text')
    return values.to_pylist()


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds_text(values: list[object], is_csv: bool) -> bool:
    """Whether a column with these values may hold text; in CSV all is text, and what looks like numbers is taken for numbers."""
    filled = [value for value in values if value not in (None, "")]
    return not filled or not all(map(_is_number, filled)) if is_csv else all(isinstance(value, str) for value in filled)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


@contextlib.contextmanager
def _parquet_errors(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # of the file, not of its content
        raise InputError(f"{where}: cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _open(path: str) -> BinaryIO:
    openers: dict[str, Callable[[str], BinaryIO]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
    return openers.get(Path(path).suffix.lower(), lambda path: open(path, "rb"))(path)


def _open_zst(path: str) -> BinaryIO:
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), "zstd"))


def _text_lines(file: BinaryIO, path: str, column: str) -> Iterator[str]:
    """Lines without their ends; a text file has one column, whatever its name."""
    return (line.rstrip("\r\n") for line in _lines(file, path))


def _lines(file: BinaryIO, path: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: line {number} is not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8") from None
        yield text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text


def _json_objects(file: BinaryIO, path: str) -> Iterator[dict[str, object]]:
    """One object a line; or the objects of an array, all of which is then read at once."""
    lines = ((number, line) for number, line in enumerate(_lines(file, path), 1) if line.strip())
    first_number, first = next(lines, (1, ""))
    if first.lstrip().startswith("["):
        lines = iter([(first_number, first + "".join(line for _, line in lines))])
    elif first:
        lines = itertools.chain([(first_number, first)], lines)
    for number, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON: {getattr(error, 'msg', error)}") from None
        for fields in value if isinstance(value, list) and number == first_number else [value]:
            if not isinstance(fields, dict):
                raise InputError(f"{path}: line {number} is not a JSON object")
            yield fields


def _json_texts(file: BinaryIO, path: str, column: str) -> Iterator[str | None]:
    """A row may lack the column, but not all of the first ones, or all there are."""
    names: dict[str, None] | None = {}  # of the columns so far, until the wanted one is seen
    for number, fields in enumerate(_json_objects(file, path), 1):
        text = fields.get(column)
        if text is not None and not isinstance(text, str):
            raise InputError(f'{path}: row {number}: text_column "{column}" holds {json.dumps(text)[:40]}, not text')
        if names is not None:
            names = None if column in fields else names | dict.fromkeys(fields)
            if names is not None and number == READ_ROWS:
                break
        yield text
    if names:
        raise InputError(f'{path} has no column "{column}"; it has: {listed(names)}')


def _csv_objects(file: BinaryIO, path: str) -> Iterator[dict[str, str | None]]:
    csv.field_size_limit(2**31 - 1)  # bytes; the most that every platform takes
    rows = csv.reader(_lines(file, path), delimiter="\t" if re.search(r"\.tsv(\.\w+)?$", path, re.IGNORECASE) else ",")
    try:
        names = next(rows, [])
        for values in rows:
            if len(values) > len(names):
                raise InputError(f"{path}: line {rows.line_num} has {len(values)} fields, and the first line names {len(names)}")
            if values:
                yield dict(itertools.zip_longest(names, values))
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num} is not CSV: {error}") from None


def _csv_texts(file: BinaryIO, path: str, column: str) -> Iterator[str | None]:
    for number, fields in enumerate(_csv_objects(file, path)):
        if not number and column not in fields:
            raise InputError(f'{path} has no column "{column}"; it has: {listed(fields)}')
        yield fields[column]


# (file, path for errors, column) -> the column's rows
READERS: dict[str, Callable[[BinaryIO, str, str], Iterator[str | None]]] = {"text": _text_lines, "json": _json_texts, "csv": _csv_texts}


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
