"""What every source of text is to the rest: parts that are read in order, a few rows at a time, from any row on.

A part is a file, or a piece of a table. So a reader that stopped goes on where it was without reading the parts before it.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from .config import Config, InputError

HELD_OUT_SHARE = 0.1
HELD_OUT_AT_MOST = 10_000  # or about so many
READ_ROWS = 200  # handed over at a time: few enough that rows of a megabyte fit


@dataclasses.dataclass(frozen=True)
class Part:
    """size: in any unit that all parts share. read(row): yields the text column from that row on, None for an empty row."""

    size: float
    read: Callable[[int], Iterator[list[str | None]]]


@dataclasses.dataclass(frozen=True)
class Position:
    """Where the next row stands: `row` of `part`, with `rows` rows before it in all."""

    part: int = 0
    row: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a corpus is thought to hold before it is read. is_exact says that `documents` was counted, not reckoned."""

    documents: int
    megabytes: float  # of UTF-8 text
    is_exact: bool = False


class Corpus:
    """A dataset whose rows can be read in one fixed order.

    description: one line for people. key: changes whenever the rows may have changed. is_remote: reading costs transfer, so rows that
    `head` has read are kept for the next `read`. open_parts: called once, at the first read. remember: called when all is prepared.
    """

    def __init__(self, description: str, key: str, open_parts: Callable[[], list[Part]], estimate: Estimate, max_samples: int | None,
                 is_remote: bool = False, remember: Callable[[], None] = lambda: None) -> None:
        self.description = description
        self.key = key
        self.estimate = estimate
        self.max_samples = max_samples
        self.is_remote = is_remote
        self.remember = remember
        self._open_parts = open_parts
        self._parts: list[Part] | None = None
        self._ahead: list[tuple[list[str | None], Position]] = []
        self._reading: Iterator[tuple[list[str | None], Position]] | None = None

    @property
    def parts(self) -> list[Part]:
        if self._parts is None:
            self._parts = self._open_parts()
        return self._parts

    def cache_folder(self, config: Config) -> Path:
        """Where everything that is prepared from this corpus is kept."""
        return Path(config.cache_dir) / self.key

    def read(self, start: Position = Position()) -> Iterator[tuple[list[str | None], Position]]:
        """Some rows at a time, with the position behind them, up to `max_samples` rows in all."""
        if start == Position() and self._reading:
            reading, self._reading = self._reading, None
            while self._ahead:
                yield self._ahead.pop(0)
            yield from reading
        else:
            yield from self._read_parts(start)

    def head(self, characters: int) -> Iterator[list[str | None]]:
        """The first rows that hold so many characters; from each part its share, where that costs nothing and all parts are wanted."""
        wants_all = self.max_samples is None or self.estimate.documents < self.max_samples
        if wants_all and not self.is_remote and len(self.parts) > 1:
            size = sum(part.size for part in self.parts)
            for part in self.parts:
                yield from _first(part.read(0), characters * part.size / size)
            return
        if not self.is_remote:
            yield from _first((rows for rows, _ in self._read_parts(Position())), characters)
            return
        self._reading = self._read_parts(Position())
        for rows, position in self._reading:
            self._ahead.append((rows, position))
            yield rows
            characters -= sum(len(row) for row in rows if row)
            if characters <= 0:
                return

    def _read_parts(self, start: Position) -> Iterator[tuple[list[str | None], Position]]:
        rows_before = start.rows
        for number in range(start.part, len(self.parts)):
            row = start.row if number == start.part else 0
            for rows in self.parts[number].read(row):
                rows = rows if self.max_samples is None else rows[: self.max_samples - rows_before]
                row, rows_before = row + len(rows), rows_before + len(rows)
                if rows:
                    yield rows, Position(number, row, rows_before)
                if rows_before == self.max_samples:
                    return


def _first(batches: Iterator[list[str | None]], characters: float) -> Iterator[list[str | None]]:
    for rows in batches:
        yield rows
        characters -= sum(len(row) for row in rows if row)
        if characters <= 0:
            return


def clean(row: str | None) -> str:
    """A row's text without a byte-order mark and surrounding white space, "" where it holds none."""
    return "" if row is None else row.strip().strip("\ufeff\0").strip()


def split_hash(text: str, seed: int) -> int:
    """64 bits from (seed, text), so that duplicates fall on one side of the split, in any order, on any machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def choose_text_column(table: pa.Table, wanted: str | None, where: str) -> str:
    """The column to train on: the wanted one, else "text", else the only one that holds text. Raises InputError with the columns' names."""
    names = table.column_names
    if wanted is not None and wanted not in names:
        raise InputError(f'{where} has no column "{wanted}" (text_column); it has: {", ".join(names)}')
    texts = [field.name for field in table.schema if _is_text(field.type)]
    if wanted is None and "text" not in names and len(texts) != 1:
        raise InputError(f"{where}: set text_column to the column to train on; it has: {', '.join(names)}")
    return wanted or ("text" if "text" in names else texts[0])


def text_rows(table: pa.Table, column: str, where: str) -> list[str | None]:
    """The values of the text column. Raises InputError where it is missing or holds anything but text."""
    if column not in table.column_names:
        raise InputError(f'{where} has no column "{column}"; it has: {", ".join(table.column_names)}')
    values = table.column(column)
    if not _is_text(values.type) and not pa.types.is_null(values.type):
        raise InputError(f'{where}: text_column "{column}" holds {values.type}, not text')
    return values.to_pylist()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
