"""Texts with labels, to fine-tune on: the bundled reviews, your csv, jsonl and parquet files, or a dataset of the Hub."""

import dataclasses
import os

import numpy as np

from .config import InputError
from .corpus import imdb_file, labelled_imdb
from .dataset_names import file_kind, hub_id, named_files
from .documents import clean
from .file_formats import choose_text_column, listed

LABEL_COLUMNS = ("label", "labels", "sentiment", "class")  # where none is named
MOST_LABELS = 1000


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """labels: int64 [N], numbers of `names`."""

    texts: list[str]
    labels: np.ndarray
    names: list[str]

    def take(self, chosen: np.ndarray) -> "LabelledTexts":
        """chosen: bool [N], or numbers."""
        numbers = np.arange(len(self.texts))[chosen]
        return LabelledTexts([self.texts[number] for number in numbers], self.labels[numbers], self.names)


def read_labelled(dataset: str, text_column: str | None, label_column: str | None, max_samples: int | None, seed: int) -> LabelledTexts:
    """All rows that have a text and a label, or `max_samples` of them, drawn by the seed.

    Raises InputError where the dataset cannot be read, a column is missing, or there are not at least two labels.
    """
    if dataset == "imdb":
        rows = labelled_imdb(imdb_file())
    else:
        rows = _read_table(dataset, text_column, label_column)
    rows = [(text, label) for text, label in ((clean(text), label) for text, label in rows) if text and label is not None]
    if max_samples is not None and max_samples < len(rows):
        rows = [rows[number] for number in sorted(np.random.default_rng(seed).permutation(len(rows))[:max_samples])]
    names = sorted({label for _, label in rows})
    if not 2 <= len(names) <= MOST_LABELS:
        raise InputError(f"{dataset}: {len(names):,} different labels; from 2 to {MOST_LABELS:,} can be told apart. Is label_column the right one?")
    numbers = {name: number for number, name in enumerate(names)}
    return LabelledTexts([text for text, _ in rows], np.array([numbers[label] for _, label in rows]), names)


def _read_table(dataset: str, text_column: str | None, label_column: str | None) -> list[tuple[str | None, str | None]]:
    """By the library `datasets`: a table with labels is one that memory holds."""
    import datasets  # only here, because it takes a while to load

    datasets.disable_progress_bars()
    files = named_files(dataset)
    try:
        if files:
            kinds = {file_kind(file) for file in files}
            if len(kinds) != 1 or kinds - {"csv", "json", "parquet"}:
                raise InputError(f"{dataset}: give csv, jsonl or parquet files, of one kind: a text file has no labels")
            options = {"delimiter": "\t"} if ".tsv" in os.path.basename(files[0]).lower() else {}
            table = datasets.load_dataset(kinds.pop(), data_files=files, split="train", **options)
        elif hub_id(dataset):
            table = datasets.load_dataset(*hub_id(dataset), split="train")
        else:
            raise InputError(f'dataset = "{dataset}" is no file that exists: give imdb, csv, jsonl or parquet files, or a Hub id such as org/name')
    except InputError:
        raise
    except Exception as error:  # of every reader and of the network
        raise InputError(f"{dataset} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    names = table.column_names
    label_column = label_column or next((name for name in LABEL_COLUMNS if name in names), None)
    if label_column not in names:
        raise InputError(f"{dataset}: set --label-column to the column with the labels; it has: {listed(names)}")
    texts = [name for name, feature in table.features.items() if getattr(feature, "dtype", None) in ("string", "large_string") and name != label_column]
    text_column = choose_text_column(names, texts, text_column, dataset)
    feature = table.features[label_column]
    labels = table[label_column]
    if hasattr(feature, "int2str"):
        labels = [feature.int2str(label) if label is not None and label >= 0 else None for label in labels]  # -1: not labelled
    if text_column not in texts:
        raise InputError(f'{dataset}: text_column "{text_column}" does not hold text')
    return [(text, None if label is None else str(label)) for text, label in zip(table[text_column], labels)]
