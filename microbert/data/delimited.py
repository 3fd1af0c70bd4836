"""Read text files with separated fields: detect the separator, handle quotation marks, report errors with their line.

CSV follows RFC 4180: a field that begins with a quotation mark ends with one, and quotation marks inside it are
doubled. TSV has no quoting by its definition (IANA, text/tab-separated-values), yet Excel and pandas write quoted
fields; so in TSV a quotation mark counts only if the line, read as quoted, has the right number of fields.
"""

import contextlib
import csv
import itertools
import re
from collections.abc import Iterator

from microbert.errors import InputError

# in the order in which they are tried; the last ones are those of Hive and of older exports
SEPARATORS = {
    ",": "commas",
    ";": "semicolons",
    "\t": "tabs",
    "|": "vertical bars",
    "^": '"^"',
    "~": '"~"',
    "\x01": "U+0001",
}
EXCEL_HINT = re.compile(r"sep=(.)\s*")  # a line that Excel writes and reads above the names
SAMPLE_LINES = 200  # used to detect the separator
MAX_LINES_PER_FIELD = 1000  # of a quoted field in TSV
# so many lines inside a quoted field that all look like rows are an error, by the number of columns
MIN_ROWS_IN_FIELD = {2: 2}
DEFAULT_MIN_ROWS_IN_FIELD = 1  # for other numbers of columns
SAVE_WITH_LF = "Save the file with Unix (LF) or Windows (CR LF) line endings"
MAX_FIELD_LENGTH = 2**28  # characters: stops at an unclosed quotation mark before a large file fills the memory


def read_delimited(lines: Iterator[str], path: str) -> tuple[list[str], Iterator[list[str | None]]]:
    """Return the names of the columns and the rows below them, each padded with None to the number of names.

    Empty rows are skipped. Raises InputError, with the line, for a row with more fields than names and for a quotation
    mark that is not closed; and if the separator cannot be detected.
    """
    csv.field_size_limit(MAX_FIELD_LENGTH)
    sample = list(itertools.islice(lines, SAMPLE_LINES))
    separator = detect_separator(sample, path)
    n_above = next(
        (number for number, line in enumerate(sample) if line.strip() and not EXCEL_HINT.fullmatch(line)), 0
    )  # lines above the names
    below = itertools.chain(sample[n_above:], lines)
    records = _tab_separated(below, n_above, path) if separator == "\t" else _quoted(below, separator, n_above, path)
    _, names = next(records, (1, []))
    names = [name.strip() for name in names]
    return names, _padded(records, names, path)


def usual_separator(path: str) -> str:
    """Return the usual separator for a file of this name."""
    return "\t" if re.search(r"\.tsv(\.\w+)?$", path, re.IGNORECASE) else ","


def detect_separator(sample: list[str], path: str) -> str:
    """Return the usual separator for the file's name if it splits the first lines into equal rows, else one that does.

    sample: the first lines. Raises InputError if the first line has another separator than the other lines.
    """
    if sample and (hint := EXCEL_HINT.fullmatch(sample[0])):
        return hint[1]
    usual = usual_separator(path)
    header = next((line for line in sample if line.strip()), "")
    others = [separator for separator in SEPARATORS if separator != usual and separator in header]
    fitting = [separator for separator in others if _fits(sample, separator, path)]
    if usual in header:
        return fitting[0] if fitting and not _fits(sample, usual, path) else usual
    if others and not fitting:
        raise InputError(
            f"{path}: cannot detect what separates its fields: most lines have another number of "
            f"{SEPARATORS[others[0]]} than the first. Save it with {SEPARATORS[usual]} between fields"
        )
    return fitting[0] if fitting else usual


def _fits(sample: list[str], separator: str, path: str) -> bool:
    """Return whether the first line has several named fields, and at least half of the others have as many."""
    lines = [line for line in sample if line.strip(" \r\n")]
    if separator == "\t":
        rows = [line.rstrip("\r\n").split("\t") for line in lines]
    else:
        with _csv_errors(path, 1):
            rows = [row for row in csv.reader(lines, delimiter=separator, skipinitialspace=True) if row]
    if len(sample) == SAMPLE_LINES and len(rows) > 1:
        rows.pop()  # the sample may end within it
    names, *rows = rows
    n_fitting = sum(len(row) >= len(names) and not any(row[len(names) :]) for row in rows)
    return len(names) > 1 and all(names[1:]) and 2 * n_fitting >= len(rows)


@contextlib.contextmanager
def _csv_errors(path: str, line: int) -> Iterator[None]:
    """Turn errors of the csv module in a row that begins at this line into InputError."""
    try:
        yield
    except csv.Error as error:
        if "new-line" in str(error):
            raise InputError(
                f"{path}: near line {line}: a field contains a carriage return (CR). {SAVE_WITH_LF}"
            ) from None
        raise InputError(
            f"{path}: line {line}: the row that begins here is not valid CSV ({error}): a field that begins with a "
            "quotation mark must end with one, and quotation marks inside it must be doubled"
        ) from None


def _padded(records: Iterator[tuple[int, list[str]]], names: list[str], path: str) -> Iterator[list[str | None]]:
    """Yield each row with as many fields as there are names. Raises InputError for a row with more."""
    for line, fields in records:
        if len(fields) > len(names):
            if any(field.strip() for field in fields[len(names) :]):
                plural = "column" if len(names) == 1 else "columns"
                raise InputError(
                    f"{path}: line {line} has {len(fields)} fields, but the header names {len(names)} {plural}: put "
                    "fields that contain the separator in quotation marks"
                )
            fields = fields[: len(names)]  # Excel writes empty columns
        if fields:
            yield fields + [None] * (len(names) - len(fields))


def _quoted(lines: Iterator[str], separator: str, n_above: int, path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield rows with quoted fields, each with the number of its last line. n_above: lines before the first one."""
    row_lines: list[str] = []

    def recorded() -> Iterator[str]:
        for line in lines:
            row_lines.append(line)
            yield line

    reader = csv.reader(recorded(), delimiter=separator, skipinitialspace=True, strict=True)
    n_names = 0
    while True:
        first_line = n_above + reader.line_num + 1
        with _csv_errors(path, first_line):
            fields = next(reader, None)
        if fields is None:
            return
        n_names = n_names or len(fields)
        if len(row_lines) > 2 and not _is_fully_quoted(row_lines, fields, separator):
            _check_lines_of_row(row_lines, separator, n_names, first_line, path)
        row_lines.clear()
        yield n_above + reader.line_num, fields


def _is_fully_quoted(lines: list[str], fields: list[str], separator: str) -> bool:
    """Return whether every field of a row is in quotation marks, which two stray ones cannot cause."""
    quoted = ('"' + field.replace('"', '""') + '"' for field in fields)
    return "".join(lines).rstrip("\r\n") == separator.join(quoted)


def _check_lines_of_row(lines: list[str], separator: str, n_names: int, first_line: int, path: str) -> None:
    """Raise InputError if each line of a row is a row itself, joined by stray quotation marks in two fields."""
    n_inside = len(lines) - 2
    if n_names < 2 or n_inside < MIN_ROWS_IN_FIELD.get(n_names, DEFAULT_MIN_ROWS_IN_FIELD):
        return
    if all(len(line.split(separator)) == n_names for line in lines):
        raise InputError(
            f"{path}: line {first_line}: a quotation mark opens a field here that ends {len(lines) - 1:,} lines below, "
            "and each of these lines looks like a row: double the quotation marks that belong to the text, and put the "
            "field in quotation marks"
        )


def _tab_separated(lines: Iterator[str], n_above: int, path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield rows of tab-separated fields as `_quoted` does.

    If all names are quoted, all fields are; else only those that need it.
    """
    numbered = ((number, line.rstrip("\r\n")) for number, line in enumerate(lines, n_above + 1))
    number, first = next(numbered, (1, ""))
    names = first.split("\t")
    is_all_quoted = bool(first) and all(re.fullmatch(r'"[^"]*"', name) for name in names)
    yield number, [name[1:-1] for name in names] if is_all_quoted else names
    for number, line in numbered:
        fields = line.split("\t") if line else []
        if '"' in line:
            quoted = _unquoted(line)
            if quoted is None and len(fields) < len(names) and _is_open(fields):
                number, quoted = _over_lines(number, line, numbered, len(names), path)
            needs_quoting = is_all_quoted or '""' in line or len(fields) != len(names)
            if needs_quoting and quoted is not None and len(quoted) == len(names):
                fields = quoted
            elif is_all_quoted and quoted is None:
                raise InputError(
                    f"{path}: line {number}: the first line has its fields in quotation marks, but this one is not "
                    "quoted correctly: double the quotation marks inside a field"
                )
        yield number, fields


def _is_open(fields: list[str]) -> bool:
    """Return whether a field begins with a quotation mark that is not closed in it."""
    return any(field.startswith('"') and field.count('"') % 2 for field in fields)


def _over_lines(
    first: int, line: str, numbered: Iterator[tuple[int, str]], n_names: int, path: str
) -> tuple[int, list[str]]:
    """Return the row that begins with an open field, and the number of its last line. Consumes lines of `numbered`."""
    for number, more in itertools.islice(numbered, MAX_LINES_PER_FIELD):
        line += "\n" + more
        if '"' in more and (quoted := _unquoted(line)) is not None:
            if len(quoted) == n_names:
                return number, quoted
            break
        if n_names > 1 and more.count("\t") == n_names - 1:  # a row of its own
            break
    raise InputError(
        f"{path}: line {first}: a quotation mark opens a field here that is not closed before the next row; close the "
        "field, or double the quotation mark"
    )


def _unquoted(line: str) -> list[str] | None:
    """Return the fields of a line with quoted fields, None if it is not valid."""
    try:
        rows = list(csv.reader([part + "\n" for part in line.split("\n")], delimiter="\t", strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None
