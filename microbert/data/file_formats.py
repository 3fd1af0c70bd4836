"""Read the rows of a file (txt, jsonl, csv, parquet, compressed or not) in batches, starting at any row.

Only the wanted columns are parsed, and values stay as written. `datasets.load_dataset` reads these formats, too, but it
infers the types of all columns from the first rows and stops at a later row of another type, treats words such as NA as
missing values, reads every column of a parquet file, and can hang a process that stops reading one before its end.
"""

import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence

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
    detect_separator,
    read_delimited,
    usual_separator,
)
from microbert.data.file_kinds import HEAD_BYTES, detect_kind, open_file, reading_errors
from microbert.data.tables import MAX_DEPTH, class_name, parquet_columns, read_labelled_parquet, read_parquet
from microbert.errors import InputError

BYTE_ORDER_MARK = "\ufeff"
MAX_WORDS_OF_A_NAME = 4  # of a column; a first line with more words is a row
NO_LABELS = "a text file has no labels; use csv, jsonl or parquet files"
CLASS_NUMBER = re.compile(r"-?\d{1,9}", re.ASCII)
MISSING = object()


def read_rows(path: str, column: str, row: int = 0) -> Iterator[list[str | None]]:
    """Yield batches of the text column from `row` on, None for a row without a text.

    A row of a text file is a line, whatever the column. Raises InputError, if possible with the line, for a file that
    cannot be read.
    """
    with reading_errors(path), open_file(path) as file:
        if (kind := detect_kind(path, file)) == "parquet":
            yield from read_parquet(file, column, row, path)
        else:
            values = READERS[kind](file, path, (column,), False)
            texts = (as_text(value, path, column, number) for number, (value,) in enumerate(values, 1))
            yield from _in_batches(itertools.islice(texts, row, None))


def read_labelled_rows(
    path: str, text_column: str, label_column: str, classes: list[str]
) -> Iterator[tuple[str | None, str | None]]:
    """Yield text and label of every row, None for a missing one.

    classes: the names of the classes 0, 1, ..., if the label column holds their numbers. Raises InputError as
    `read_rows` does, and for a row with several labels.
    """
    with reading_errors(path), open_file(path) as file:
        values: Iterator[tuple[object, object]]
        if (kind := detect_kind(path, file)) == "parquet":
            values = read_labelled_parquet(file, text_column, label_column, classes, path)
        elif kind == "text":
            raise InputError(f"{path}: {NO_LABELS}")
        else:
            rows = READERS[kind](file, path, (text_column, label_column), True)
            values = ((text, _as_class(label, kind, classes) if classes else label) for text, label in rows)
        for number, (text, label) in enumerate(values, 1):
            yield as_text(text, path, text_column, number), as_label(label, path, label_column, number)


def _as_class(label: object, kind: str, classes: list[str]) -> object:
    """Return the name of the class if the label is its number, else the label. In JSON, a text is not a number."""
    if isinstance(label, str) and (kind == "csv" or isinstance(label, WrittenNumber)) and CLASS_NUMBER.fullmatch(label):
        return class_name(int(label), classes)
    return label


def find_text_column(path: str, wanted: str | None) -> str | None:
    """Return the column to train on, None if the file holds no row.

    Raises InputError, with the names of the columns, if it cannot be chosen.
    """
    with reading_errors(path), open_file(path) as file:
        if (kind := detect_kind(path, file)) == "text":
            return "text" if any(True for _ in file) else None
        found = _columns(file, path, kind, [wanted, "text"])
        return found and choose_text_column(found[0], wanted, path, found[1])


def find_labelled_columns(path: str, text_column: str | None, label_column: str | None) -> tuple[str, str] | None:
    """Return the columns with texts and labels, None if the file holds no row.

    Raises InputError if they cannot be chosen, and for a text file.
    """
    with reading_errors(path), open_file(path) as file:
        if (kind := detect_kind(path, file)) == "text":
            raise InputError(f"{path}: {NO_LABELS}")
        known = [text_column, label_column, "text", *LABEL_COLUMNS]
        found = _columns(file, path, kind, known, n_objects=None)  # the first label may come late
        if found is None:
            return None
        columns, sample = found
        label = choose_label_column(columns, label_column, path)
        others = [column for column in columns if column.name != label]
        return choose_text_column(others, text_column, path, sample), label


def describe_column(path: str, column: str) -> str:
    """Return, for the user, where a file holds its documents: the column, and the separator if it is an unusual one."""
    usual = usual_separator(path)
    with reading_errors(path), open_file(path) as file:
        if (kind := detect_kind(path, file)) == "text":
            return "one document per line"
        sample = list(itertools.islice(_lines(file, path), SAMPLE_LINES)) if kind == "csv" else []
        separator = detect_separator(sample, path)
    unusual = f", separated by {SEPARATORS.get(separator, repr(separator))}" if separator != usual else ""
    return f'text column "{column}"{unusual}'


def name_hints(path: str) -> tuple[str | None, str]:
    """Return what a file's name decides about how it is read: its format, and the separator to try first."""
    return file_kind(path), usual_separator(path)


def is_json_object(text: str) -> bool:
    """Return whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _columns(
    file: io.BufferedReader, path: str, kind: str, known: list[str | None], n_objects: int | None = READ_ROWS
) -> tuple[list[Column], Callable[[str], list[object]]] | None:
    """Return the columns of a table, and a function that returns a column's first values; None without rows.

    known: names that identify a header. n_objects: the number of JSON objects to examine, None for all.
    """
    if kind == "parquet":
        return parquet_columns(file, path)
    values: dict[str, list[object]] = {}
    if kind == "csv":
        names, records = read_delimited(_lines(file, path), path)
        rows = list(itertools.islice(records, READ_ROWS))
        if rows and not {name.strip().lower() for name in filter(None, known)} & {name.lower() for name in names}:
            _check_header(names, rows, path)
        texts = {name: [row[number] for row in rows] for number, name in enumerate(names)} if rows else {}
        columns = [Column(name, _holds_in_csv(name, texts[name])) for name in texts]
        values = {name: list(column) for name, column in texts.items()}
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
    """Raise InputError if the first line of a CSV file looks like a row."""
    looks_like_data = [
        name
        for number, name in enumerate(names)
        if name and (_is_number(name) or _is_sentence(name) or any(row[number] == name for row in rows))
    ]
    if looks_like_data:
        raise InputError(
            f"{path}: the first line should name the columns, but looks like a row ({looks_like_data[0][:40]!r}). Add "
            "a first line such as text,label; or, if these are names, set text_column to one of them: "
            f"{listed(Column(name, TEXT) for name in names)}"
        )


def _is_sentence(name: str) -> bool:
    """Return whether a name has too many words for one, and is not a question of a survey."""
    return len(name.split()) > MAX_WORDS_OF_A_NAME and not name.endswith(("?", ":"))


def _holds(value: object) -> str:
    """Return the kind of a JSON value, as in `Column.holds`."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, str):
        return TEXT
    return A_LIST if isinstance(value, list) else NUMBERS if isinstance(value, int | float) else OTHER


def _holds_of_all(kinds: set[str]) -> str:
    """Return what a column holds from the kinds of its values."""
    filled = kinds - {NOTHING}
    return next(iter(filled or kinds)) if len(filled) < 2 else A_LIST if A_LIST in filled else OTHER


def _holds_in_csv(name: str, values: list[str | None]) -> str:
    """Return what a CSV column holds: numbers if all of its values look like numbers and its name is not "text"."""
    filled = [value for value in values if value]
    is_text = name.lower() == "text" or not all(map(_is_number, filled))
    return NOTHING if not filled else TEXT if is_text else NUMBERS


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _lines(file: io.BufferedReader, path: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, without a byte-order mark."""
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
    if b"\r" in head[:-1] and b"\n" not in head and len(head) < HEAD_BYTES:
        raise InputError(f"{path}: lines end with a lone carriage return (CR). {SAVE_WITH_LF}")
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: line {number} is not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8"
            ) from None
        yield text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text


def _text_values(
    file: io.BufferedReader, path: str, columns: tuple[str, ...], as_written: bool
) -> Iterator[tuple[str]]:
    """Yield lines without their line endings: the only column of a text file, whatever its name."""
    return ((line.rstrip("\r\n"),) for line in _lines(file, path))


def _json_objects(file: io.BufferedReader, path: str, as_written: bool = False) -> Iterator[dict[str, object]]:
    """Yield one object per line; or the objects of an array, which is read into memory as a whole.

    as_written: return numbers as WrittenNumber.
    """
    parse = functools.partial(
        json.loads,
        parse_float=WrittenNumber if as_written else None,
        parse_int=WrittenNumber if as_written else None,
        parse_constant=WrittenNumber if as_written else None,
    )
    lines: Iterator[tuple[int, str]] = enumerate(_lines(file, path), 1)
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
            raise InputError(f"{path}: line {number} is not valid JSON: {getattr(error, 'msg', error)}") from None
        for item, fields in enumerate(value if is_array and isinstance(value, list) else [value], 1):
            if not isinstance(fields, dict):
                raise InputError(f"{path}: {f'item {item:,}' if is_array else f'line {number}'} is not a JSON object")
            yield fields


def _json_values(
    file: io.BufferedReader, path: str, columns: tuple[str, ...], as_written: bool
) -> Iterator[tuple[object, ...]]:
    """Yield the values of the columns of each object.

    Raises InputError if all objects lack a column; unless `as_written`, already if the first READ_ROWS lack it.
    """
    unseen, number = set(columns), 0  # the columns that no object had so far
    names: dict[str, None] = {}  # all columns so far, in order
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
    """Return the value of a column, or of a nested field such as `data.text`; None if the object lacks it."""
    return next(_found(fields, column), None)


def _has(fields: dict[str, object], column: str) -> bool:
    return next(_found(fields, column), MISSING) is not MISSING


def _found(fields: dict[str, object], column: str) -> Iterator[object]:
    """Yield the values with a name, ignoring outer spaces: several are possible, because names may contain dots."""
    if column in fields:
        yield fields[column]
    for name, value in fields.items():
        if name != column and name.strip() == column.strip():
            yield value
        elif isinstance(value, dict) and column.startswith(name + "."):
            yield from _found(value, column[len(name) + 1 :])


def _nested_values(fields: dict[str, object], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, object]]:
    """Yield the columns of an object and their values, with the fields of nested objects instead of these."""
    for name, value in fields.items():
        if isinstance(value, dict) and value and depth < MAX_DEPTH:
            yield from _nested_values(value, f"{prefix}{name}.", depth + 1)
        else:
            yield prefix + name, value


def _csv_values(
    file: io.BufferedReader, path: str, columns: tuple[str, ...], as_written: bool
) -> Iterator[tuple[str | None, ...]]:
    names, records = read_delimited(_lines(file, path), path)
    first = next(records, None)
    if first is None:
        return
    for column in columns:
        if names.count(column.strip()) != 1:
            number = "several columns" if column.strip() in names else "no column"
            raise InputError(f'{path} has {number} "{column}"; it has: {listed(Column(name, TEXT) for name in names)}')
    numbers = [names.index(column.strip()) for column in columns]
    for record in itertools.chain([first], records):
        yield tuple(record[number] for number in numbers)


# (file, path for messages, columns, whether to keep numbers as written) -> the values of each row
READERS: dict[str, Callable[[io.BufferedReader, str, tuple[str, ...], bool], Iterator[tuple[object, ...]]]] = {
    "text": _text_values,
    "json": _json_values,
    "csv": _csv_values,
}


def _in_batches(rows: Iterator[str | None]) -> Iterator[list[str | None]]:
    """Group rows into batches of READ_ROWS rows or READ_CHARACTERS characters."""
    batch: list[str | None] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row) if row else 0
        if len(batch) == READ_ROWS or characters >= READ_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
