"""Parquet files are read in the thread that asks: one of Arrow's could outlive the interpreter and abort it."""

import io
import threading

import pyarrow as pa
import pyarrow.parquet
import pytest

from microbert.data.tables import parquet_columns, parquet_text_column, read_labelled_parquet, read_parquet


class WatchedFile(io.BytesIO):
    """A file that records the threads that read it."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self.threads = set()

    def read(self, *size):
        self.threads.add(threading.get_ident())
        return super().read(*size)


@pytest.mark.parametrize(
    "read",
    [
        lambda file: parquet_columns(file, "file")[1]("text"),
        lambda file: parquet_text_column(file, None, "file"),
        lambda file: list(read_parquet(file, "text", 0, "file")),
        lambda file: list(read_labelled_parquet(file, "text", "label", [], "file")),
    ],
    ids=["columns", "text column", "rows", "labelled rows"],
)
def test_a_parquet_file_is_read_in_the_calling_thread(read):
    written = io.BytesIO()
    rows = {"text": [f"text {number}" for number in range(5000)], "label": [number % 2 for number in range(5000)]}
    pa.parquet.write_table(pa.table(rows), written, row_group_size=1000)
    file = WatchedFile(written.getvalue())
    assert read(file)
    assert file.threads == {threading.get_ident()}
