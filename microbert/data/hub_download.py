"""A Hub dataset downloaded through `datasets`, which saves it as an Arrow table in HF_HOME.

The download runs in a child process, because `datasets` downloads with a pool of threads that Python joins at exit: in
this process, a transfer that hangs would delay a stop without limit. The child is killed. It costs about 2 seconds of
imports, little beside a download.
"""

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from microbert.data.corpus import READ_ROWS, Part
from microbert.data.hub_dataset import HubDataset, TextColumn
from microbert.data.hub_errors import explain, retry
from microbert.data.tables import table_rows, table_text_column
from microbert.errors import InputError
from microbert.runtime.child_process import call_in_child
from microbert.runtime.waiting import never_stop

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

T = TypeVar("T")

TABLE_PARTS = 100  # of a downloaded dataset, so that the tokenizer's sample covers all of it


def downloaded_parts(
    dataset: HubDataset, text_column: TextColumn, check_stop: Callable[[], None] = never_stop
) -> list[Part]:
    """Return slices of the dataset's table, after downloading what HF_HOME lacks."""
    table = run_in_child(_download, dataset, check_stop).with_format("arrow")
    column = text_column.known() or table_text_column(table[:READ_ROWS], None, dataset.label)
    text_column.choose(column)
    stored_name = column if column in table.column_names else column.split(".")[0]
    if stored_name in table.column_names:  # else `table_rows` raises the error, with the names that exist
        table = table.select_columns([stored_name])
    step = max(1, -(-len(table) // TABLE_PARTS))
    return [
        _part(table, column, dataset.label, first, min(first + step, len(table)))
        for first in range(0, len(table), step)
    ]


def _part(table: "Dataset", column: str, label: str, first: int, end: int) -> Part:
    """Return the rows from `first` to `end`, exclusive."""

    def read(row: int) -> Iterator[list[str | None]]:
        for start in range(first + row, end, READ_ROWS):
            try:
                yield table_rows(table[start : min(end, start + READ_ROWS)], column, label)
            except UnicodeDecodeError as error:
                raise InputError(f'{label}: column "{column}" is not UTF-8 after row {start:,} ({error})') from None

    return Part(end - first, read)


def run_in_child(work: Callable[[HubDataset], T], dataset: HubDataset, check_stop: Callable[[], None]) -> T:
    """Return what `work(dataset)` returns in a child process, which a stop kills. Retry after a network error."""
    return retry(lambda: call_in_child(_explained, work, dataset, check_stop=check_stop), dataset.label, check_stop)


def _explained(work: Callable[[HubDataset], T], dataset: HubDataset) -> T:
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which Python reports as leaked after a kill
    try:
        return work(dataset)
    except Exception as error:  # explained here, because an error loses its causes on the way to the parent
        raise explain(error, dataset.label, is_of_dataset=True) from None


def _download(dataset: HubDataset) -> "Dataset":
    """Return the train split, which pickles as the paths of its files."""
    return prepare_table(dataset.load_builder())


def prepare_table(builder: "DatasetBuilder") -> "Dataset":
    """Return the train split, after downloading what HF_HOME lacks. Cards are often outdated, so do not check sizes."""
    builder.download_and_prepare(verification_mode="no_checks")
    return builder.as_dataset(split="train")


def labelled_files(repo_id: str, name: str | None) -> tuple[list[str], "Dataset | None", dict[str, list[str]]]:
    """Return the train split, and the names of the classes by column as the dataset's card lists them.

    The split is a list of local copies of its files if this suite reads them, else the table that `datasets` makes of
    them, in the format "arrow". Raises the errors of `datasets` and of the Hub as they are.
    """
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    builder = datasets.load_dataset_builder(repo_id, name)
    features = builder.info.features or {}
    classes = {column: list(of.names) for column, of in features.items() if isinstance(of, datasets.ClassLabel)}
    try:
        paths = HubDataset(repo_id, name, builder.hash).train_files(builder)
    except InputError:  # the card says how to read it, or the machine is offline and `datasets` may have the table
        return [], prepare_table(builder).with_format("arrow"), classes
    revision = builder.hash
    copies = [huggingface_hub.hf_hub_download(repo_id, path, repo_type="dataset", revision=revision) for path in paths]
    return copies, None, classes
