"""Texts with labels, to fine-tune on: the bundled reviews, your csv, jsonl and parquet files, or a dataset of the
Hub."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from microbert.config.dataset_names import file_kind, hub_id, some_names
from microbert.data.columns import as_label, choose_label_column, sorted_labels
from microbert.data.corpus import clean
from microbert.data.file_formats import find_labelled_columns, read_labelled_rows
from microbert.data.hub_reader import first_line, is_network_trouble, labelled_files
from microbert.data.local_files import readable_files
from microbert.data.sources import imdb_file, labelled_imdb
from microbert.data.tables import table_columns, table_labels, table_rows, table_text_column
from microbert.errors import InputError

MOST_LABELS = 1000
READ_ROWS = 1000  # of a table of the Hub at a time

Rows = Iterator[tuple[str | None, str | None]]  # text and label, None for what a row lacks


@dataclasses.dataclass(frozen=True)
class Source:
    """Where labelled texts come from, in words for people, and how many rows could not be used."""

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
        return f"{self.description}: {self.rows:,} rows, {used:,} used; skipped: {', '.join(skipped) or 'none'}"


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """labels: int64 [N], numbers of `names`. source: None for texts that were not read from anywhere."""

    texts: list[str]
    labels: np.ndarray
    names: list[str]
    source: Source | None = None

    def take(self, chosen: np.ndarray) -> "LabelledTexts":
        """chosen: bool [N], or numbers."""
        numbers = np.arange(len(self.texts))[chosen]
        return dataclasses.replace(self, texts=[self.texts[number] for number in numbers], labels=self.labels[numbers])


def read_labelled(
    dataset: str, text_column: str | None, label_column: str | None, max_samples: int | None, seed: int
) -> LabelledTexts:
    """All rows that have a text and a label, or `max_samples` of them, drawn by the seed.

    Labels are what is written in the file. Raises InputError where the dataset cannot be read, a column is missing, a
    row has several labels, or there are not at least two labels.
    """
    if dataset == "imdb":
        description, rows = "imdb (film reviews, bundled)", iter(labelled_imdb(imdb_file()))
    elif (files := readable_files(dataset)).paths:
        tables = [path for path in files.paths if file_kind(path) != "text"]
        texts = [path for path in files.paths if file_kind(path) == "text"] if tables else []
        description, rows = _of_files(dataset, tables or files.paths, text_column, label_column, {})
        description += f"; {files.left_out}" if files.left_out else ""
        description += f"; text files, which have no labels, left out: {some_names(texts)}" if texts else ""
    elif hub_id(dataset):
        description, rows = _of_hub(dataset, text_column, label_column)
    else:
        raise InputError(
            f'dataset = "{dataset}" is no file that exists: give imdb, csv, jsonl or parquet files, '
            "or a Hub id such as org/name"
        )
    all_rows = [(clean(text), label) for text, label in rows]
    without_text = sum(not text for text, _ in all_rows)
    kept = [(text, label) for text, label in all_rows if text and label is not None]
    source = Source(description, len(all_rows), without_text, len(all_rows) - without_text - len(kept))
    if max_samples is not None and max_samples < len(kept):
        kept = [kept[number] for number in sorted(np.random.default_rng(seed).permutation(len(kept))[:max_samples])]
    names = sorted_labels(label for _, label in kept)
    if not 2 <= len(names) <= MOST_LABELS:
        raise InputError(
            f"{source}. They have {len(names):,} different labels, and from 2 to {MOST_LABELS:,} are supported. "
            "Is label_column the right one?"
        )
    numbers = {name: number for number, name in enumerate(names)}
    return LabelledTexts([text for text, _ in kept], np.array([numbers[label] for _, label in kept]), names, source)


def _of_files(
    dataset: str, paths: list[str], text_column: str | None, label_column: str | None, classes: dict[str, list[str]]
) -> tuple[str, Rows]:
    """The description and the rows of files, all of which have the columns of the first that holds a row.

    classes: by column, what its numbers mean.
    """
    columns = next(filter(None, (find_labelled_columns(path, text_column, label_column) for path in paths)), None)
    if columns is None:
        raise InputError(f"{dataset}: there is no row in it")
    return f"{dataset} ({_described(*columns)})", (
        row for path in paths for row in read_labelled_rows(path, *columns, classes.get(columns[1], []))
    )


def _of_hub(dataset: str, text_column: str | None, label_column: str | None) -> tuple[str, Rows]:
    """The same for the train split of a dataset of the Hub: of its files where they can be read here, else of the
    table that `datasets` makes of them."""
    try:
        files, table, classes = labelled_files(*hub_id(dataset))
    except InputError:
        raise
    except Exception as error:  # of the dataset, its card and the network
        name = hub_id(dataset)[0]
        advice = (
            f'. Where there is a network, run "hf download --repo-type dataset {name} --local-dir '
            f'{name.split("/")[1]}", '
            "and give the training files as --dataset"
            if is_network_trouble(error)
            else ""
        )
        raise InputError(f"{dataset} cannot be read: {first_line(error)}{advice}") from error
    if files:
        return _of_files(dataset, files, text_column, label_column, classes)
    first = table[:READ_ROWS]
    columns = table_columns(first.schema)
    label = choose_label_column(columns, label_column, dataset)
    text = table_text_column(first, text_column, dataset, without=label)

    def rows() -> Rows:
        number = 0
        for start in range(0, len(table), READ_ROWS):
            part = table[start : start + READ_ROWS]
            for written, value in zip(
                table_rows(part, text, dataset), table_labels(part, label, classes.get(label, []), dataset)
            ):
                number += 1
                yield written, as_label(value, dataset, label, number)

    return f"{dataset} ({_described(text, label)})", rows()


def _described(text_column: str, label_column: str) -> str:
    return f'text column "{text_column}", label column "{label_column}"'
