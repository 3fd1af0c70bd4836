"""The rows of a text file with separated fields: which separator, what a quotation mark means, and errors with their
line.

CSV follows RFC 4180: a field that begins with a quotation mark ends with one, and marks inside it are doubled. TSV has
no quotation marks by its definition (IANA, text/tab-separated-values), yet Excel and pandas write some; so there a mark
counts only where the line, read as quoted, makes sense.
"""

import csv
import itertools
import re
from collections.abc import Iterator

from .config import InputError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
EXCEL_HINT = re.compile(r"sep=(.)\s*")  # the line that Excel writes and reads above the names
NO_SEPARATORS = set(" _-.'\"()[]{}?\r\n")  # characters that names of columns have
SAMPLE_LINES = 200  # from which the separator is told
MOST_LINES_OF_A_FIELD = 1000  # of a quoted field in TSV
ROWS_IN_A_FIELD = 5  # lines inside one quoted field that are rows themselves: then its first mark is no quotation mark
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
    others += sorted(
        {character for character in header if not character.isalnum() and character not in NO_SEPARATORS}
        - {usual, *others}
    )
    agreeing = [separator for separator in others if _agree(sample, separator)]
    if usual in header:
        return next(
            (separator for separator in agreeing if separator in SEPARATORS and not _agree(sample, usual)), usual
        )
    if others and others[0] in SEPARATORS and not agreeing:
        raise InputError(
            f"{path}: the separator of its fields cannot be told: its lines do not have as many "
            f"{SEPARATORS[others[0]]} as the first. Save it with {SEPARATORS[usual]} between fields"
        )
    return agreeing[0] if agreeing else usual


def _agree(sample: list[str], separator: str) -> bool:
    """Whether all lines have as many fields as the first, which has several."""
    if separator == "\t":
        rows = [line.rstrip("\r\n").split("\t") for line in sample if line.strip()]
    else:
        rows = [row for row in csv.reader(sample, delimiter=separator, skipinitialspace=True) if row]
    if len(sample) == SAMPLE_LINES and len(rows) > 1:
        rows.pop()  # its end may not be in the sample
    return len(rows) > 1 and len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows)


def _filled(records: Iterator[tuple[int, list[str]]], names: list[str], path: str) -> Iterator[list[str | None]]:
    for line, fields in records:
        if len(fields) > len(names):
            raise InputError(f"{path}: line {line} has {len(fields)} fields, and the first line names {len(names)}")
        if fields:
            yield fields + [None] * (len(names) - len(fields))


def _quoted(lines: Iterator[str], separator: str, n_above: int, path: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with quoted fields, each with the number of its last line. n_above: lines of the file before the first."""
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    n_names = 0
    while True:
        first_line = n_above + reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{path}: line {first_line}: the row that begins here is not CSV ({error}): a field that "
                "begins with a quotation mark must end with one, and marks inside it must be doubled"
            ) from None
        if fields is None:
            return
        n_names = n_names or len(fields)
        last_line = n_above + reader.line_num
        if last_line - first_line > ROWS_IN_A_FIELD:
            _check_long_fields(fields, separator, n_names, first_line, path)
        yield last_line, fields


def _check_long_fields(fields: list[str], separator: str, n_names: int, line: int, path: str) -> None:
    """Raises InputError where a quoted field has swallowed rows: two fields that begin or end with a stray mark make
    one."""
    for field in fields:
        inside = field.splitlines()[1:-1]
        if (
            n_names > 1
            and len(inside) >= ROWS_IN_A_FIELD
            and all(len(row) == n_names for row in csv.reader(inside, delimiter=separator))
        ):
            raise InputError(
                f"{path}: line {line}: a quotation mark opens a field here that goes over {len(inside) + 2:,} "
                "lines, and these look like rows: double the marks that belong to the text, "
                "and put the field in quotation marks"
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
            if (
                quoted is None and len(fields) < len(names) and re.search(r'(^|\t)"', line)
            ):  # a quoted field may go over several lines
                ahead = []
                for number_ahead, more in itertools.islice(numbered, MOST_LINES_OF_A_FIELD):
                    ahead.append((number_ahead, more))
                    line += "\n" + more
                    if '"' in more and (quoted := _unquoted(line)) is not None:
                        break
                if quoted is None or len(quoted) != len(names):
                    raise InputError(
                        f"{path}: line {number} has {len(fields)} fields, and the first line names "
                        f"{len(names)}: a quotation mark opens a field here that does not close"
                    )
                number = ahead[-1][0]
            if (
                quoted is not None
                and len(quoted) == len(names)
                and (is_all_quoted or '""' in line or quoted != fields and len(fields) != len(names))
            ):
                fields = quoted
        yield number, fields


def _unquoted(line: str) -> list[str] | None:
    """The fields of a line, read as one with quoted fields; None where it is none."""
    try:
        rows = list(csv.reader(line.splitlines(keepends=True), delimiter="\t", strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None
