"""The interface of a text source: parts that are read in order, a few rows at a time, starting at any row.

A part is a file or a slice of a table, so an interrupted reader resumes without reading the parts before its position.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from microbert.config.constants import Config

HELD_OUT_SHARE = 0.1
HELD_OUT_AT_MOST = 10_000  # documents, approximately
READ_ROWS = 200  # rows in a batch
READ_CHARACTERS = 1_000_000  # characters in a batch, if rows are long


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a corpus.

    size: in any unit that all parts share. read(row): yields the text column from that row on, None for an empty row.
    """

    size: float
    read: Callable[[int], Iterator[list[str | None]]]


@dataclasses.dataclass(frozen=True)
class Position:
    """The position of the next row: `row` of `part`, after `rows` rows of the corpus."""

    part: int = 0
    row: int = 0
    rows: int = 0


START = Position()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The size of a corpus before it is read. is_exact: `documents` is a count, not an estimate."""

    documents: int
    megabytes: float  # of UTF-8 text
    is_exact: bool = False


class Corpus:
    """A dataset whose rows can be read in one fixed order.

    description: one line for the user. key: changes whenever the rows may have changed. open_parts: called once, at the
    first read. is_remote: reading transfers data, so the next `read` reuses the rows that `head` has read. remember:
    called when everything is prepared. notes: lines for the user about how the dataset was found.
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
        notes: Sequence[str] = (),
    ) -> None:
        self.description = description
        self.key = key
        self.estimate = estimate
        self.max_samples = max_samples
        self.is_remote = is_remote
        self.remember = remember
        self.notes = notes
        self._open_parts = open_parts
        self._parts: list[Part] | None = None
        self._ahead: list[tuple[list[str | None], Position]] = []
        self._reading: Iterator[tuple[list[str | None], Position]] | None = None

    @property
    def summary(self) -> str:
        """What to print when the corpus is opened: its notes, its description and its size."""
        about = "" if self.estimate.is_exact else "about "
        noun = "document" if self.estimate.documents == 1 else "documents"
        size = f"{about}{self.estimate.documents:,} {noun}, {self.estimate.megabytes:,.0f} MB of text"
        advice = "--dataset accepts a Hub id, or paths and globs of your own files"
        return "\n".join([*self.notes, f"dataset: {self.description}, {size}; {advice}"])

    @property
    def parts(self) -> list[Part]:
        """The parts, opened at the first use."""
        if self._parts is None:
            self._parts = self._open_parts()
        return self._parts

    def cache_folder(self, config: Config) -> Path:
        """Return the folder for everything prepared from this corpus."""
        return Path(config.cache_dir) / self.key

    def read(self, start: Position = START) -> Iterator[tuple[list[str | None], Position]]:
        """Yield batches of rows, each with the position after it, `max_samples` rows at most."""
        if start == START and self._reading:
            reading, self._reading = self._reading, None
            while self._ahead:
                yield self._ahead.pop(0)
            yield from reading
        else:
            yield from self._read_parts(start)

    def head(self, characters: int) -> Iterator[list[str | None]]:
        """Yield first rows with so many characters in all.

        If all parts are local and wanted, each part contributes in proportion to its size.
        """
        wants_all = self.max_samples is None or self.estimate.documents < self.max_samples
        if wants_all and not self.is_remote and len(self.parts) > 1:
            size, left = sum(part.size for part in self.parts), float(characters)
            for part in self.parts:
                for rows in _first(part.read(0), characters * part.size / size):
                    left -= sum(len(row) for row in rows if row)
                    yield rows
                if left <= 0:  # long rows may exceed their part's share
                    return
            return
        if not self.is_remote:
            yield from _first((rows for rows, _ in self._read_parts(START)), characters)
            return
        self._reading = self._read_parts(START)
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
    """Yield the first rows, until they hold so many characters."""
    for rows in batches:
        lengths = itertools.accumulate(len(row) if row else 0 for row in rows)
        n_rows = 1 + sum(length < characters for length in lengths)
        yield rows[:n_rows]
        characters -= sum(len(row) for row in rows if row)
        if characters <= 0:
            return


def clean(row: str | None) -> str:
    """Return a row's text without a byte-order mark and surrounding white space, "" for None.

    Halves of surrogate pairs become "?".
    """
    if row is None:
        return ""
    text = row.strip().strip("\ufeff\0").strip()
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def split_hash(text: str, seed: int) -> int:
    """Return a 64-bit hash of (seed, text): duplicates are on the same side of the split, on any machine."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")
