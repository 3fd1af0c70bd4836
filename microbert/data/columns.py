"""Choose the text column and the label column of a table, and check the values of both.

A column that you name is used. Without a name, a column is chosen only if no other could be meant.
"""

import dataclasses
import datetime
import decimal
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence

from microbert.data.corpus import clean
from microbert.errors import InputError

LABEL_COLUMNS = ("label", "labels", "sentiment", "class")  # tried in this order if you name none
TEXT, NUMBERS, A_LIST, NOTHING, OTHER = "text", "numbers", "a list", "nothing", "not text"  # the content of a column
MAX_LISTED_COLUMNS, MAX_NAME_LENGTH = 50, 80  # in a message; the second in characters
# a column with one of these names holds text, whatever its first values look like
TEXT_NAMES = {
    "abstract",
    "article",
    "body",
    "comment",
    "content",
    "contents",
    "description",
    "doc",
    "document",
    "message",
    "paragraph",
    "passage",
    "post",
    "question",
    "review",
    "sentence",
    "seq",
    "sequence",
    "story",
    "summary",
    "title",
    "tweet",
    "utterance",
}
# names of columns whose strings are not text to train on
IDENTIFIER_NAMES = re.compile(
    r"(^|[^a-z])(id|ids|uid|uuid|guid|key|index|hash|md5|sha\d*|doi|isbn|url|urls|uri|link|href|website|domain|path"
    r"|file|filename|file_name|address|email|e-mail|mail|phone|ip|date|datetime|time|timestamp|author|user"
    r"|username|name)$"
)
# a value that is an address, or a single word with a digit, a slash or an underscore
IDENTIFIER = re.compile(
    r"(https?://|www\.|ftp://|mailto:)\S+|\S+@\S+\.\S+|(?=\S*[\d/\\_])[\w.:/\\#&=?%+~@-]+", re.ASCII
)
LONG_WORD = 200  # characters: a DNA sequence without spaces is text, and identifiers of this length are rare
MAX_EXAMINED = 1000  # characters of a value
SEVERAL_NAMES = re.compile(r"\w ?[,;|:~^\t\x01]{1,2} ?\w")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d{1,4})?", re.IGNORECASE | re.ASCII)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table. name: `data.text` for a nested field. holds: TEXT, NUMBERS, A_LIST, NOTHING or OTHER."""

    name: str
    holds: str

    def __str__(self) -> str:
        """The name for a message, in one line, with its content unless that is text."""
        return " ".join(self.name.split())[:MAX_NAME_LENGTH] + (f" ({self.holds})" if self.holds != TEXT else "")


class WrittenNumber(str):
    """A number as written in its file: 3.10 is neither 3.1 nor a text."""


def listed(columns: Iterable[Column]) -> str:
    """Return the columns in one line, with a limit on their number."""
    names = [str(column) for column in columns]
    return ", ".join(names[:MAX_LISTED_COLUMNS]) + (
        f" and {len(names) - MAX_LISTED_COLUMNS} more" if len(names) > MAX_LISTED_COLUMNS else ""
    )


def choose_text_column(
    columns: Sequence[Column], wanted: str | None, where: str, sample: Callable[[str], list[object]]
) -> str:
    """Return the wanted column, else "text", else the only column with text that is not identifiers or addresses.

    where: the table's name for messages. sample(name): the first values of a column. Raises InputError, with the names
    of the columns, if none can be chosen.
    """
    if wanted is not None:
        if (found := _named(columns, wanted)) is None:
            raise InputError(f'{where} has no column "{wanted}"; set text_column to one of: {listed(columns)}')
        return found
    texts = [column.name for column in columns if column.holds == TEXT]
    named = [column.name for column in columns if column.name.strip().lower() == "text"]
    usable = [column.name for column in columns if column.name in named and column.holds in (TEXT, NOTHING)]
    if usable:
        return "text" if "text" in usable else usable[0]
    if len(texts) != 1:
        if not texts:
            raise InputError(f"{where} has no column with text; it has: {listed(columns)}")
        raise InputError(
            f"{where} has several columns with text; set text_column to the one to train on: {listed(columns)}"
        )
    if SEVERAL_NAMES.search(texts[0]):
        raise InputError(
            f'{where}: the header, "{texts[0]}", looks like several names with an unsupported separator. Save the file '
            "with commas between fields, or set text_column to this name"
        )
    if _holds_identifiers(texts[0], sample(texts[0])):
        raise InputError(
            f'{where}: the only column with text, "{texts[0]}", seems to hold identifiers or addresses; set '
            f"text_column to the one to train on: {listed(columns)}"
        )
    return texts[0]


def choose_label_column(columns: Sequence[Column], wanted: str | None, where: str) -> str:
    """Return the wanted column, else the first of LABEL_COLUMNS.

    Raises InputError, with the names of the columns, if there is none.
    """
    for name in LABEL_COLUMNS if wanted is None else (wanted,):
        if (found := _named(columns, name)) is not None:
            return found
    missing = "no label column" if wanted is None else f'no column "{wanted}"'
    raise InputError(
        f"{where} has {missing}; set label_column (--label-column) to the one with the labels: {listed(columns)}"
    )


def as_text(value: object, where: str, column: str, row: int) -> str | None:
    """Return the value of a text column, None for a missing one.

    row: counted from 1, for messages. Raises InputError if the value is not text.
    """
    if value is None or type(value) is str:
        return value
    raise InputError(
        f'{where}: row {row:,}: column "{column}" holds {_shown(value)}, not text; correct this row, or set '
        "text_column to another column"
    )


def as_label(value: object, where: str, column: str, row: int) -> str | None:
    """Return a label as written, without surrounding white space; None for null, NaN and empty text.

    row: counted from 1, for messages. Raises InputError for a list or an object: a row has one label.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, WrittenNumber) and value == "NaN":
        return None
    if isinstance(value, bool):
        return str(value).lower()  # as in JSON
    if isinstance(value, str | int | float | decimal.Decimal | datetime.date | datetime.time):
        return clean(str(value)) or None
    is_list = isinstance(value, list | tuple)
    rule = "only one label per row is supported" if is_list else "a label must be a text or a number"
    raise InputError(f'{where}: row {row:,}: label column "{column}" holds {_shown(value)}; {rule}')


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels, sorted as numbers if all are numbers, else alphabetically."""
    different = set(labels)
    if all(NUMBER.fullmatch(label) for label in different):
        return sorted(different, key=lambda label: (decimal.Decimal(label), label))
    return sorted(different)


def _named(columns: Sequence[Column], wanted: str) -> str | None:
    """Return the column with this name, if necessary ignoring outer spaces."""
    for candidates in (
        [c.name for c in columns if c.name == wanted],
        [c.name for c in columns if c.name.strip() == wanted.strip()],
    ):
        if candidates:
            return candidates[0]
    return None


def _holds_identifiers(name: str, values: list[object]) -> bool:
    """Return whether the strings of a column are identifiers rather than text. values: the first ones."""
    last = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.rpartition(".")[2].strip()).lower()  # doc.sourceUrl -> source_url
    if last in TEXT_NAMES:
        return _share(values, lambda text: IDENTIFIER.fullmatch(text) is not None) > 0.9
    return IDENTIFIER_NAMES.search(last) is not None or _share(values, _is_prose) < 0.5


def _share(values: list[object], holds: Callable[[str], bool]) -> float:
    """Return the share of the texts among the values for which `holds` is true."""
    texts = [text[:MAX_EXAMINED] for text in map(clean, (value for value in values if isinstance(value, str))) if text]
    return sum(map(holds, texts)) / max(1, len(texts))


def _is_prose(text: str) -> bool:
    """Return whether a text is several words, a long sequence, or in a script without spaces; and not an address."""
    if IDENTIFIER.fullmatch(text) and len(text) < LONG_WORD:
        return False
    has_letters = any(character.isalpha() for character in text)
    return has_letters and (len(text.split()) > 1 or len(text) >= LONG_WORD or not text.isascii())


def _shown(value: object) -> str:
    """Return the beginning of a value, for a message."""
    if isinstance(value, WrittenNumber):
        return value[:40]
    return json.dumps(value, ensure_ascii=False, default=str)[:40]
