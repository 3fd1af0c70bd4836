"""A Hub dataset streamed file by file, from any row on.

Parquet files are read by row group, the text column alone; other files one after another from a temporary copy.
`datasets` would transfer the beginning of the first of them twice, and a parquet stream that it leaves unfinished can
abort the process at exit. The files are listed in a child process, because that starts threads which Python joins at
exit: a listing that hangs would delay a stop without limit. Each later request runs in a daemon thread
(`in_background`), which a stop abandons; a child process for each would take longer than the request.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from microbert.data.corpus import Part
from microbert.data.file_formats import find_text_column, read_rows
from microbert.data.hub_dataset import HubDataset, TextColumn
from microbert.data.hub_download import run_in_child
from microbert.data.hub_errors import wait_or_raise
from microbert.data.tables import parquet_text_column, read_parquet
from microbert.errors import InputError
from microbert.runtime.waiting import in_background, never_stop

SMALL_FILE = 8_000_000  # bytes: transferred whole, in one request


class HubStream:
    """The train split of a dataset, read over the network. copies: the folder for temporary copies of files."""

    def __init__(
        self,
        dataset: HubDataset,
        text_column: TextColumn,
        copies: Path,
        check_stop: Callable[[], None] = never_stop,
    ) -> None:
        self.dataset, self.text_column = dataset, text_column
        self.copies, self.check_stop = copies, check_stop

    def parts(self) -> list[Part]:
        """Return one part for each file, without transferring any of them yet.

        Raises InputError for a dataset that only `datasets` reads as its card defines.
        """

        paths = run_in_child(_list_files, self.dataset, self.check_stop)
        return [Part(1, functools.partial(self._read, path)) for path in paths]

    def _read(self, path: str, row: int) -> Iterator[list[str | None]]:
        """Yield the text column of a file from `row` on. After a network error, resume after the last row."""
        read, attempt = self._read_parquet if path.lower().endswith(".parquet") else self._read_copy, 0
        while True:
            try:
                for rows in read(path, row):
                    yield rows
                    row, attempt = row + len(rows), 0
                return
            except Exception as error:
                attempt += 1
                is_missing = isinstance(error, FileNotFoundError)
                wait_or_raise(error, attempt, self.dataset.label, self.check_stop, is_of_dataset=is_missing)

    def _read_parquet(self, path: str, row: int) -> Iterator[list[str | None]]:
        """Yield the text column alone, by row group, decoded in this thread."""
        import huggingface_hub

        where, hub = f"{self.dataset.repo_id}/{path}", huggingface_hub.HfFileSystem()
        url = f"datasets/{self.dataset.repo_id}@{self.dataset.revision}/{path}"
        # a small file in one transfer; of a large one only the ranges that are read, without read-ahead
        is_small = in_background(lambda: hub.info(url)["size"], self.check_stop) <= SMALL_FILE
        cache = "all" if is_small else "none"
        with in_background(lambda: hub.open(url, "rb", cache_type=cache), self.check_stop) as opened:
            file = cast(BinaryIO, _InterruptibleFile(opened, self.check_stop))
            column = parquet_text_column(file, self.text_column.known(), where)
            self.text_column.choose(column)
            yield from read_parquet(file, column, row, where)

    def _read_copy(self, path: str, row: int) -> Iterator[list[str | None]]:
        """Yield the text column from a temporary copy, which is deleted after its last row."""
        import huggingface_hub

        huggingface_hub.utils.disable_progress_bars()  # the preparation shows its own
        download = functools.partial(
            huggingface_hub.hf_hub_download,
            self.dataset.repo_id,
            path,
            repo_type="dataset",
            revision=self.dataset.revision,
            local_dir=self.copies,
        )
        copy = str(in_background(download, self.check_stop))
        try:
            column = self.text_column.known() or find_text_column(copy, None)
            if column is not None:  # the file holds a row
                self.text_column.choose(column)
                yield from read_rows(copy, column, row)
        except InputError as error:
            raise InputError(str(error).replace(copy, f"{self.dataset.repo_id}/{path}")) from None
        Path(copy).unlink()


def _list_files(dataset: HubDataset) -> list[str]:
    """Return the paths of the train split's files."""
    return dataset.train_files(dataset.load_builder())


class _InterruptibleFile:
    """A file on the Hub. A read ends as soon as `check_stop` raises."""

    def __init__(self, file: BinaryIO, check_stop: Callable[[], None]) -> None:
        self._file, self._check_stop = file, check_stop

    def read(self, size: int = -1) -> bytes:
        return in_background(lambda: self._file.read(size), self._check_stop)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)
