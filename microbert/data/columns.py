"""Which column of a table holds the text and which the labels: as the user names them, or where there is no doubt;
and what a label is."""

import dataclasses
import datetime
import decimal
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence

from microbert.data.corpus import clean
from microbert.errors import InputError

LABEL_COLUMNS = ("label", "labels", "sentiment", "class")  # where none is named
TEXT, NUMBERS, A_LIST, NOTHING, OTHER = "text", "numbers", "a list", "nothing", "not text"  # what a column holds
MOST_NAMES, LONGEST_NAME = 50, 80  # of columns in an error; characters
# names that say that a column is text, whatever its first values look like
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
# names of columns with strings that nobody trains on
IDENTIFIER_NAMES = re.compile(
    r"(^|[^a-z])(id|ids|uid|uuid|guid|key|index|hash|md5|sha\d*|doi|isbn|url|urls|uri|link|href|website|domain|path"
    r"|file|filename|file_name|address|email|e-mail|mail|phone|ip|date|datetime|time|timestamp|author|user"
    r"|username|name)$"
)
# a value that is an address, or one word with a digit in it, a slash or an underscore
IDENTIFIER = re.compile(
    r"(https?://|www\.|ftp://|mailto:)\S+|\S+@\S+\.\S+|(?=\S*[\d/\\_])[\w.:/\\#&=?%+~@-]+", re.ASCII
)
LONG_WORD = 200  # characters: a sequence of DNA without a space is text, an identifier of that length is rare
LONGEST_LOOKED_AT = 1000  # characters of a value
SEVERAL_NAMES = re.compile(r"\w ?[,;|:~^\t\x01]{1,2} ?\w")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d{1,4})?", re.IGNORECASE | re.ASCII)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table, by its name (`data.text` for the field text of data), and what it holds, as above."""

    name: str
    holds: str

    def __str__(self) -> str:
        """Its name in one line for people, whatever is in it."""
        return " ".join(self.name.split())[:LONGEST_NAME] + (
            f" ({self.holds})" if self.holds in (A_LIST, OTHER) else ""
        )


class WrittenNumber(str):
    """A number as its file has it: 3.10 is neither 3.1 nor a text."""


def listed(columns: Iterable[Column]) -> str:
    """The columns in one line, however many there are."""
    names = [str(column) for column in columns]
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def choose_text_column(
    columns: Sequence[Column], wanted: str | None, where: str, sample: Callable[[str], list[object]]
) -> str:
    """The wanted column, else "text", else the only one with text, where it does not hold identifiers or addresses.

    where: the table's name in errors. sample(name): the first values of a column. Raises InputError, with the columns'
    names, where none can be chosen.
    """
    if wanted is not None:
        if (found := _named(columns, wanted)) is None:
            raise InputError(f'{where} has no column "{wanted}" (text_column); it has: {listed(columns)}')
        return found
    texts = [column.name for column in columns if column.holds == TEXT]
    named = [column.name for column in columns if column.name.strip().lower() == "text"]
    usable = [column.name for column in columns if column.name in named and column.holds in (TEXT, NOTHING)]
    if usable:
        return "text" if "text" in usable else usable[0]
    if len(texts) != 1:
        raise InputError(f"{where}: set text_column to the column to train on; it has: {listed(columns)}")
    if SEVERAL_NAMES.search(texts[0]):
        raise InputError(
            f'{where}: set text_column to the column to train on; "{texts[0]}" looks like several names with a '
            "separator that is not known here"
        )
    if _holds_identifiers(texts[0], sample(texts[0])):
        raise InputError(
            f'{where}: set text_column to the column to train on; the only one with text, "{texts[0]}", '
            "seems to hold identifiers or addresses. "
            f"It has: {listed(columns)}"
        )
    return texts[0]


def choose_label_column(columns: Sequence[Column], wanted: str | None, where: str) -> str:
    """The wanted column, else the first of LABEL_COLUMNS.

    Raises InputError, with the columns' names, where there is none.
    """
    for name in LABEL_COLUMNS if wanted is None else (wanted,):
        if (found := _named(columns, name)) is not None:
            return found
    missing = "" if wanted is None else f'there is no column "{wanted}": '
    raise InputError(
        f"{where}: {missing}set label_column (--label-column) to the column with the labels; it has: {listed(columns)}"
    )


def as_text(value: object, where: str, column: str, row: int) -> str | None:
    """The value of a text column, None for a missing one.

    row: from 1, for errors. Raises InputError for what is no text.
    """
    if value is None or type(value) is str:
        return value
    raise InputError(f'{where}: row {row:,}: text_column "{column}" holds {_shown(value)}, not text')


def as_label(value: object, where: str, column: str, row: int) -> str | None:
    """A label as its file has it, without the white space around it; None where a row has none (null, NaN or an empty
    text).

    row: from 1, for errors. Raises InputError for a list or an object: a row has one label.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, WrittenNumber) and value == "NaN":
        return None
    if isinstance(value, bool):
        return str(value).lower()  # as JSON has it
    if isinstance(value, str | int | float | decimal.Decimal | datetime.date | datetime.time):
        return clean(str(value)) or None
    several = (
        "several labels a row are not supported" if isinstance(value, list | tuple) else "a label is a text or a number"
    )
    raise InputError(f'{where}: row {row:,}: label_column "{column}" holds {_shown(value)}; {several}')


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """The different labels in the order of their numbers where all are numbers, else of their letters."""
    different = set(labels)
    if all(NUMBER.fullmatch(label) for label in different):
        return sorted(different, key=lambda label: (decimal.Decimal(label), label))
    return sorted(different)


def _named(columns: Sequence[Column], wanted: str) -> str | None:
    """The column of that name, outer spaces aside."""
    for candidates in (
        [c.name for c in columns if c.name == wanted],
        [c.name for c in columns if c.name.strip() == wanted.strip()],
    ):
        if candidates:
            return candidates[0]
    return None


def _holds_identifiers(name: str, values: list[object]) -> bool:
    """Whether a column with strings names things rather than being text. values: the first ones."""
    last = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.rpartition(".")[2].strip()).lower()  # doc.sourceUrl -> source_url
    if last in TEXT_NAMES:
        return _share(values, lambda text: IDENTIFIER.fullmatch(text) is not None) > 0.9
    return IDENTIFIER_NAMES.search(last) is not None or _share(values, _is_prose) < 0.5


def _share(values: list[object], holds: Callable[[str], bool]) -> float:
    texts = [
        text[:LONGEST_LOOKED_AT] for text in map(clean, (value for value in values if isinstance(value, str))) if text
    ]
    return sum(map(holds, texts)) / max(1, len(texts))


def _is_prose(text: str) -> bool:
    """Several words, or letters of a script that has no spaces between them, or a long sequence; and no address."""
    if IDENTIFIER.fullmatch(text) and len(text) < LONG_WORD:
        return False
    has_letters = any(character.isalpha() for character in text)
    return has_letters and (len(text.split()) > 1 or len(text) >= LONG_WORD or not text.isascii())


def _shown(value: object) -> str:
    if isinstance(value, WrittenNumber):
        return value[:40]
    return json.dumps(value, ensure_ascii=False, default=str)[:40]
