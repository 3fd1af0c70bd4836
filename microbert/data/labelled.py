"""Texts with labels for fine-tuning: the bundled reviews, your csv, jsonl and parquet files, or a Hub dataset."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from microbert.config.dataset_names import file_kind, hub_id, some_names
from microbert.data.columns import as_label, choose_label_column, sorted_labels
from microbert.data.corpus import clean
from microbert.data.file_formats import find_labelled_columns, read_labelled_rows
from microbert.data.hub_download import labelled_files
from microbert.data.hub_errors import first_line, is_network_error
from microbert.data.local_files import readable_files
from microbert.data.sources import imdb_file, labelled_imdb
from microbert.data.tables import table_columns, table_labels, table_rows, table_text_column
from microbert.errors import InputError

MAX_LABELS = 1000
READ_ROWS = 1000  # of a table of `datasets`, at a time

Rows = Iterator[tuple[str | None, str | None]]  # text and label, None for a missing one


@dataclasses.dataclass(frozen=True)
class Source:
    """Where labelled texts come from, as a line for the user, and the numbers of rows read and skipped."""

    description: str
    rows: int
    without_text: int
    without_label: int

    def __str__(self) -> str:
        used = self.rows - self.without_text - self.without_label
        skipped = [
            f"{number:,} without a {what}"
            for number, what in ((self.without_text, "text"), (self.without_label, "label"))
            if number
        ]
        rows = "1 row" if self.rows == 1 else f"{self.rows:,} rows"
        return f"{self.description}: {rows}, {used:,} used; skipped: {', '.join(skipped) or 'none'}"


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """N texts with labels. labels: int64 [N], indices into `names`. source: None for texts that were not read."""

    texts: list[str]
    labels: np.ndarray
    names: list[str]
    source: Source | None = None

    def take(self, chosen: np.ndarray) -> "LabelledTexts":
        """Return the chosen texts. chosen: bool [N], or indices."""
        numbers = np.arange(len(self.texts))[chosen]
        return dataclasses.replace(self, texts=[self.texts[number] for number in numbers], labels=self.labels[numbers])


def read_labelled(
    dataset: str, text_column: str | None, label_column: str | None, max_samples: int | None, seed: int
) -> LabelledTexts:
    """Return all rows that have a text and a label, or a random sample of `max_samples` of them.

    Labels are returned as written in the file. Raises InputError if the dataset cannot be read, a column is missing, a
    row has several labels, or the number of distinct labels is not between 2 and MAX_LABELS.
    """
    description, rows = _open_rows(dataset, text_column, label_column)
    all_rows = [(clean(text), label) for text, label in rows]
    without_text = sum(not text for text, _ in all_rows)
    kept = [(text, label) for text, label in all_rows if text and label is not None]
    source = Source(description, len(all_rows), without_text, len(all_rows) - without_text - len(kept))
    if max_samples is not None and max_samples < len(kept):
        kept = [kept[number] for number in sorted(np.random.default_rng(seed).permutation(len(kept))[:max_samples])]
    names = sorted_labels(label for _, label in kept)
    if not 2 <= len(names) <= MAX_LABELS:
        count = "1 distinct label" if len(names) == 1 else f"{len(names):,} distinct labels"
        raise InputError(
            f"{source}. They have {count}, but 2 to {MAX_LABELS:,} are supported; check that label_column is correct"
        )
    numbers = {name: number for number, name in enumerate(names)}
    return LabelledTexts([text for text, _ in kept], np.array([numbers[label] for _, label in kept]), names, source)


def _open_rows(dataset: str, text_column: str | None, label_column: str | None) -> tuple[str, Rows]:
    """Return the description of a dataset for the user, and its rows."""
    if dataset == "imdb":
        return "imdb (film reviews, bundled)", iter(labelled_imdb(imdb_file()))
    if (files := readable_files(dataset)).paths:
        tables = [path for path in files.paths if file_kind(path) != "text"]
        texts = [path for path in files.paths if file_kind(path) == "text"] if tables else []
        description, rows = _rows_of_files(dataset, tables or files.paths, text_column, label_column, {})
        description += f"; {files.skipped}" if files.skipped else ""
        description += f"; text files skipped, because they have no labels: {some_names(texts)}" if texts else ""
        return description, rows
    if (found := hub_id(dataset)) is not None:
        return _rows_of_hub(dataset, *found, text_column, label_column)
    raise InputError(
        f'dataset = "{dataset}": no such file; use imdb, csv, jsonl or parquet files, or a Hub id such as org/name'
    )


def _rows_of_files(
    dataset: str, paths: list[str], text_column: str | None, label_column: str | None, classes: dict[str, list[str]]
) -> tuple[str, Rows]:
    """Return the description and the rows of files, which all have the columns of the first one that holds a row.

    classes: the names of the classes by column, if it holds their numbers.
    """
    columns = next(filter(None, (find_labelled_columns(path, text_column, label_column) for path in paths)), None)
    if columns is None:
        raise InputError(f"{dataset} contains no rows")
    names = classes.get(columns[1], [])
    rows = itertools.chain.from_iterable(read_labelled_rows(path, *columns, names) for path in paths)
    return f"{dataset} ({_description(*columns)})", rows


def _rows_of_hub(
    dataset: str, repo_id: str, name: str | None, text_column: str | None, label_column: str | None
) -> tuple[str, Rows]:
    """Return the description and the rows of the train split of a dataset of the Hub.

    They are read from its files if this suite can read them, else from the table that `datasets` makes of them.
    """
    try:
        files, table, classes = labelled_files(repo_id, name)
    except InputError:
        raise
    except Exception as error:  # of the dataset, its card or the network
        advice = (
            f'. On a machine with a network, run "hf download --repo-type dataset {repo_id} --local-dir '
            f'{repo_id.split("/")[1]}", and pass the training files as --dataset'
            if is_network_error(error)
            else ""
        )
        raise InputError(f"{dataset} cannot be read: {first_line(error)}{advice}") from error
    if table is None:
        return _rows_of_files(dataset, files, text_column, label_column, classes)
    first = table[:READ_ROWS]
    label = choose_label_column(table_columns(first.schema), label_column, dataset)
    text = table_text_column(first, text_column, dataset, without=label)

    def rows() -> Rows:
        for start in range(0, len(table), READ_ROWS):
            part = table[start : start + READ_ROWS]
            texts, labels = table_rows(part, text, dataset), table_labels(part, label, classes.get(label, []), dataset)
            for number, (written, value) in enumerate(zip(texts, labels, strict=True), start + 1):
                yield written, as_label(value, dataset, label, number)

    return f"{dataset} ({_description(text, label)})", rows()


def _description(text_column: str, label_column: str) -> str:
    return f'text column "{text_column}", label column "{label_column}"'
