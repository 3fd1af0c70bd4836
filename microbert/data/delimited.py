"""The rows of a text file with separated fields: which separator, what a quotation mark means, and errors with their
line.

CSV follows RFC 4180: a field that begins with a quotation mark ends with one, and marks inside it are doubled. TSV has
no quotation marks by its definition (IANA, text/tab-separated-values), yet Excel and pandas write some; so there a mark
counts only where the line, read as quoted, makes sense.
"""

import contextlib
import csv
import itertools
import re
from collections.abc import Iterator

from microbert.errors import InputError

# in the order in which they are tried; the last are those of Hive and of older exports
SEPARATORS = {
    ",": "commas",
    ";": "semicolons",
    "\t": "tabs",
    "|": "vertical bars",
    "^": '"^"',
    "~": '"~"',
    "\x01": "U+0001",
}
EXCEL_HINT = re.compile(r"sep=(.)\s*")  # the line that Excel writes and reads above the names
SAMPLE_LINES = 200  # that show the separator
MOST_LINES_OF_A_FIELD = 1000  # of a quoted field in TSV
ROWS_IN_A_FIELD = {
    2: 2
}  # lines inside a quoted field by the number of columns: if all of them are rows, none is inside
FEWEST_ROWS_IN_A_FIELD = 1  # the same for other numbers of columns
SAVE_WITH_LF = "Save the file with the line ends of Unix (LF) or Windows (CR LF)"
LARGEST_FIELD = 2**28  # characters: a mark that never closes is noticed before a large file is in memory


def read_delimited(lines: Iterator[str], path: str) -> tuple[list[str], Iterator[list[str | None]]]:
    """The names of the columns, and the rows below the first line, each with as many fields: None where a row is
    shorter.

    Empty rows are left out. Raises InputError, with the line, where a row has more fields than there are names or a
    quotation mark never closes, and where the separator cannot be told.
    """
    csv.field_size_limit(LARGEST_FIELD)
    sample = list(itertools.islice(lines, SAMPLE_LINES))
    separator = separator_of(sample, path)
    n_above = next(
        (number for number, line in enumerate(sample) if line.strip() and not EXCEL_HINT.fullmatch(line)), 0
    )  # lines above the names
    below = itertools.chain(sample[n_above:], lines)
    records = _tab_separated(below, n_above, path) if separator == "\t" else _quoted(below, separator, n_above, path)
    _, names = next(records, (1, []))
    names = [name.strip() for name in names]
    return names, _filled(records, names, path)


def usual_separator(path: str) -> str:
    """What a file's name says about its separator."""
    return "\t" if re.search(r"\.tsv(\.\w+)?$", path, re.IGNORECASE) else ","


def separator_of(sample: list[str], path: str) -> str:
    """What separates the fields: by the file's ending where the first lines agree with that, else the one with which
    they do.

    sample: the first lines. Raises InputError where the first line has another separator than the others.
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
            f"{path}: the separator of its fields cannot be told: its lines do not have as many "
            f"{SEPARATORS[others[0]]} as the first. Save it with {SEPARATORS[usual]} between fields"
        )
    return fitting[0] if fitting else usual


def _fits(sample: list[str], separator: str, path: str) -> bool:
    """Whether the first line has several fields, each with a name, and at least half of the others as many."""
    lines = [line for line in sample if line.strip(" \r\n")]
    if separator == "\t":
        rows = [line.rstrip("\r\n").split("\t") for line in lines]
    else:
        with _csv_errors(path, 1):
            rows = [row for row in csv.reader(lines, delimiter=separator, skipinitialspace=True) if row]
    if len(sample) == SAMPLE_LINES and len(rows) > 1:
        rows.pop()  # its end may not be in the sample
    names, *rows = rows
    n_fitting = sum(len(row) >= len(names) and not any(row[len(names) :]) for row in rows)
    return len(names) > 1 and all(names[1:]) and 2 * n_fitting >= len(rows)


@contextlib.contextmanager
def _csv_errors(path: str, line: int) -> Iterator[None]:
    """Raises InputError for what the csv module raises in a row that begins at this line."""
    try:
        yield
    except csv.Error as error:
        if "new-line" in str(error):
            raise InputError(
                f"{path}: near line {line}: there is a carriage return (CR) in a field. {SAVE_WITH_LF}"
            ) from None
        raise InputError(
            f"{path}: line {line}: the row that begins here is not CSV ({error}): a field that begins with a "
            "quotation mark must end with one, and marks inside it must be doubled"
        ) from None


def _filled(records: Iterator[tuple[int, list[str]]], names: list[str], path: str) -> Iterator[list[str | None]]:
    for line, fields in records:
        if len(fields) > len(names):
            if any(field.strip() for field in fields[len(names) :]):
                advice = "" if len(names) > 1 else ": put a text that has separators in it in quotation marks"
                raise InputError(
                    f"{path}: line {line} has {len(fields)} fields, and the first line names {len(names)}{advice}"
                )
            fields = fields[: len(names)]  # empty columns, as Excel writes them
        if fields:
            yield fields + [None] * (len(names) - len(fields))


def _quoted(lines: Iterator[str], separator: str, n_above: int, path: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with quoted fields, each with the number of its last line. n_above: lines of the file before the first."""
    of_row: list[str] = []  # its lines

    def remembered() -> Iterator[str]:
        for line in lines:
            of_row.append(line)
            yield line

    reader = csv.reader(remembered(), delimiter=separator, skipinitialspace=True, strict=True)
    n_names = 0
    while True:
        first_line = n_above + reader.line_num + 1
        with _csv_errors(path, first_line):
            fields = next(reader, None)
        if fields is None:
            return
        n_names = n_names or len(fields)
        if len(of_row) > 2:
            _check_lines_of_row(of_row, separator, n_names, first_line, path)
        of_row.clear()
        yield n_above + reader.line_num, fields


def _check_lines_of_row(lines: list[str], separator: str, n_names: int, first_line: int, path: str) -> None:
    """Raises InputError where each line of a row is a row itself: stray quotation marks in two fields have made them
    one."""
    n_inside = len(lines) - 2
    if n_names > 1 and n_inside >= ROWS_IN_A_FIELD.get(n_names, FEWEST_ROWS_IN_A_FIELD):
        if all(len(line.split(separator)) == n_names for line in lines):
            raise InputError(
                f"{path}: line {first_line}: a quotation mark opens a field here that ends {len(lines) - 1:,} lines "
                "below, "
                "and each of these lines looks like a row: double the marks that belong to the text, and put the field "
                "in quotation marks"
            )


def _tab_separated(lines: Iterator[str], n_above: int, path: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of tab-separated fields, as for `_quoted`.

    All fields are quoted where the names are; else those that need it.
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
            is_row = quoted is not None and len(quoted) == len(names)
            if is_row and (is_all_quoted or '""' in line or len(fields) != len(names)):
                fields = quoted
            elif is_all_quoted and quoted is None:
                raise InputError(
                    f"{path}: line {number}: the first line has its fields in quotation marks, and this one is not so: "
                    "marks inside a field must be doubled"
                )
        yield number, fields


def _is_open(fields: list[str]) -> bool:
    """Whether one of the fields begins with a quotation mark that does not close in it."""
    return any(field.startswith('"') and field.count('"') % 2 for field in fields)


def _over_lines(
    first: int, line: str, numbered: Iterator[tuple[int, str]], n_names: int, path: str
) -> tuple[int, list[str]]:
    """The row that begins with a line with an open field, and the number of its last line.

    Takes these from `numbered`.
    """
    for number, more in itertools.islice(numbered, MOST_LINES_OF_A_FIELD):
        line += "\n" + more
        if '"' in more and (quoted := _unquoted(line)) is not None:
            if len(quoted) == n_names:
                return number, quoted
            break
        if n_names > 1 and more.count("\t") == n_names - 1:  # a row of its own
            break
    raise InputError(
        f"{path}: line {first}: a quotation mark opens a field here that does not close before the next row"
    )


def _unquoted(line: str) -> list[str] | None:
    """The fields of a line, read as one with quoted fields; None where it is none."""
    try:
        rows = list(csv.reader([part + "\n" for part in line.split("\n")], delimiter="\t", strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None
