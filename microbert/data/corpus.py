"""What every source of text is to the rest: parts that are read in order, a few rows at a time, from any row on.

A part is a file, or a piece of a table. So a reader that stopped goes on where it was without reading the parts before it.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from microbert.config.constants import Config

HELD_OUT_SHARE = 0.1
HELD_OUT_AT_MOST = 10_000  # or about so many
READ_ROWS = 200  # handed over at a time, or
READ_CHARACTERS = 1_000_000  # so many, where rows are long


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

    def __init__(
        self,
        description: str,
        key: str,
        open_parts: Callable[[], list[Part]],
        estimate: Estimate,
        max_samples: int | None,
        is_remote: bool = False,
        remember: Callable[[], None] = lambda: None,
    ) -> None:
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
            size, left = sum(part.size for part in self.parts), float(characters)
            for part in self.parts:
                for rows in _first(part.read(0), characters * part.size / size):
                    left -= sum(len(row) for row in rows if row)
                    yield rows
                if left <= 0:  # long rows may have taken more than their part's share
                    return
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
    """The first rows that hold so many characters."""
    for rows in batches:
        lengths = itertools.accumulate(len(row) if row else 0 for row in rows)
        n_rows = 1 + sum(length < characters for length in lengths)
        yield rows[:n_rows]
        characters -= sum(len(row) for row in rows if row)
        if characters <= 0:
            return


def clean(row: str | None) -> str:
    """A row's text without a byte-order mark and surrounding white space, "" where it holds none. Halves of surrogate pairs become "?"."""
    if row is None:
        return ""
    text = row.strip().strip("\ufeff\0").strip()
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def split_hash(text: str, seed: int) -> int:
    """64 bits from (seed, text), so that duplicates fall on one side of the split, in any order, on any machine."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")
