"""The rows of one commit of a Hub dataset: downloaded through `datasets`, or streamed file by file; and what the Hub's errors mean.

Streaming reads parquet files by row group (the text column alone), and other files one after another through a temporary copy, because
`datasets` transfers the beginning of the first of them twice; and a parquet stream that it leaves unfinished can abort the process at its end.
Whatever waits for the network does so in a thread that is left behind when the run is to stop.
"""

import concurrent.futures.thread
import dataclasses
import itertools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from microbert.config.dataset_names import FILE_KINDS, file_kind
from microbert.data.corpus import READ_ROWS, Part
from microbert.data.file_formats import find_text_column, read_rows
from microbert.data.tables import parquet_text_column, read_parquet, table_rows, table_text_column
from microbert.errors import Failed, InputError, Stopped
from microbert.runtime.files import find_shortage, read_json, write_json

TRIES = 8  # in a row without a single row read, each of which waits twice as long as the one before it
LONGEST_WAIT = 60.0
SMALL_FILE = 8_000_000  # bytes
TABLE_PARTS = 100  # of a downloaded dataset, so that the tokenizer's sample is spread over it
COLUMN_RECORD = "text_column.json"
SAME_ROWS = {
    "name",
    "version",
    "data_dir",
    "data_files",
    "description",
    "chunksize",
    "block_size",
    "batch_size",
    "use_threads",
    "memory_map",
    "fragment_scan_options",
    "verbose",
    "warn_bad_lines",
    "sep",
}  # settings that do not change the rows; sep is looked at by itself


class HubReader:
    """Opens the parts of one commit of a dataset. folder: the corpus's own in the cache. text_column: None where it is to be chosen."""

    def __init__(
        self,
        repo_id: str,
        name: str | None,
        revision: str,
        text_column: str | None,
        folder: Path,
        check_stop: Callable[[], None],
    ) -> None:
        self.repo_id, self.name, self.revision = repo_id, name, revision
        self.where = repo_id if name is None else f"{repo_id}:{name}"
        self.text_column = text_column
        self.folder, self.copies = folder, folder / "download"
        self.check_stop = check_stop

    def downloaded_parts(self) -> list[Part]:
        """Pieces of the table that `datasets` keeps in HF_HOME, all of it downloaded now where that was not done before."""
        builder = self._builder()

        def load() -> object:
            builder.download_and_prepare(verification_mode="no_checks")  # cards often lag behind their files
            return builder.as_dataset(split="train")

        rows = self._persist(load).with_format("arrow")
        column = self.chosen_column() or table_text_column(rows[:READ_ROWS], None, self.where)
        self._remember_column(column)
        stored_name = column if column in rows.column_names else column.split(".")[0]
        if stored_name in rows.column_names:  # table_rows names what is missing
            rows = rows.select_columns([stored_name])

        def part(first: int, end: int) -> Part:
            def read(row: int) -> Iterator[list[str | None]]:
                for start in range(first + row, end, READ_ROWS):
                    try:
                        yield table_rows(rows[start : min(end, start + READ_ROWS)], column, self.where)
                    except UnicodeDecodeError as error:
                        raise InputError(
                            f'{self.where}: column "{column}" is not UTF-8 behind row {start:,} ({error})'
                        ) from None

            return Part(end - first, read)

        step = max(1, -(-len(rows) // TABLE_PARTS))
        return [part(first, min(first + step, len(rows))) for first in range(0, len(rows), step)]

    def streamed_parts(self) -> list[Part]:
        """The files of the train split, none of them touched before its turn. Raises InputError for what only `datasets` reads as it is meant."""
        return [Part(1, lambda row, path=path: self._read(path, row)) for path in self.train_files(self._builder())]

    def train_files(self, builder: object) -> list[str]:
        """Return the paths of the train split's files in the repository.

        builder: of `datasets`. Raises InputError where this suite's readers cannot read all of them.
        """
        files = builder.config.data_files or {}
        if not files.get("train"):
            raise InputError(f"{self.where} has no train split; it has: {', '.join(map(str, files)) or 'no files'}")
        paths = [self._path(file) for file in files["train"]]
        kinds = {base.__name__.lower() for base in type(builder).__mro__} & set(FILE_KINDS.values())
        if other := [path for path in paths if file_kind(path) not in kinds]:
            raise self._not_streamable(
                f"{other[0]} is by its name no {' or '.join(sorted(kinds or set(FILE_KINDS.values())))} file"
            )
        self._check_settings(builder.config, paths)
        return paths

    def _path(self, file: str) -> str:
        """The path in the repository of a file as `datasets` names it, such as hf://datasets/org/name@commit/data/train.parquet."""
        repository, _, path = file.partition(f"@{self.revision}/")
        if repository.lower() != f"hf://datasets/{self.repo_id}".lower() or not path:
            raise self._not_streamable(f"{file} lies elsewhere")
        return path

    def _check_settings(self, settings: object, paths: list[str]) -> None:
        """The dataset's card may say how its files are to be read. Streaming reads all files of a kind in one way."""
        usual = type(settings)()
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if field.name not in SAME_ROWS and value != getattr(usual, field.name):
                raise self._not_streamable(f"its card asks for {field.name} = {value!r}")
        separators = {"\t" if re.search(r"\.tsv(\.\w+)?$", path, re.IGNORECASE) else "," for path in paths}
        if hasattr(settings, "sep") and {settings.sep} != separators:
            raise self._not_streamable(f"its card asks for sep = {settings.sep!r}")

    def _not_streamable(self, why: str) -> InputError:
        return InputError(f"{self.where}: {why}, which this suite does not stream; try it without --streaming")

    def _builder(self) -> object:
        """What `datasets` knows of the dataset. Raises InputError where a configuration has to be named."""
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()

        def load() -> object:  # `datasets` takes no revision where the machine is offline
            revision = {} if datasets.config.HF_HUB_OFFLINE else {"revision": self.revision}
            builder = datasets.load_dataset_builder(self.repo_id, self.name, **revision)
            if builder.hash != self.revision:
                raise ConnectionError(
                    f"datasets could not reach it, and has only commit {builder.hash[:12]} in its cache"
                )
            return builder

        builder = self._persist(load)
        names = list(builder.builder_configs)
        if self.name is None and len(names) > 1 and "default" not in names:
            raise InputError(
                f'dataset = "{self.repo_id}" has several configurations, such as "{self.repo_id}:{names[0]}"; it has: {", ".join(names)}'
            )
        return builder

    def _persist(self, call: Callable[[], object]) -> object:
        """What a call of `datasets` returns. Trouble with the network is waited out; any other error comes from the dataset."""
        for attempt in itertools.count(1):
            try:
                return stoppable(call, self.check_stop)
            except Exception as error:
                self._wait_out(error, attempt, is_of_dataset=True)

    def _read(self, path: str, row: int) -> Iterator[list[str | None]]:
        """The text column of a file from `row` on. Trouble on the way is waited out, and reading goes on behind the last row."""
        read, attempt = self._parquet if path.lower().endswith(".parquet") else self._copied, 0
        while True:
            try:
                for rows in read(path, row):
                    yield rows
                    row, attempt = row + len(rows), 0
                return
            except Exception as error:
                attempt += 1
                self._wait_out(error, attempt, is_of_dataset=isinstance(error, FileNotFoundError))

    def _wait_out(self, error: Exception, attempt: int, is_of_dataset: bool) -> None:
        """Waits after trouble with the network, longer each time, and raises Failed when that was long enough. Raises any other error."""
        if isinstance(error, (InputError, Failed, Stopped, MemoryError)):
            raise error
        if shortage := find_shortage(error):
            raise shortage
        if refused := refusal(error, self.where):
            raise refused from None
        if not is_network_trouble(error):
            raise InputError(f"{self.where}: {first_line(error.__cause__ or error)}") if is_of_dataset else error
        if attempt == TRIES:
            raise Failed(
                f"reading {self.where} from the Hub failed {TRIES} times in a row ({first_line(error)}). What is prepared stays: the same "
                "command goes on from here"
            ) from error
        print(f"reading {self.where}: {first_line(error)}; trying again", file=sys.stderr)
        wait(min(LONGEST_WAIT, 2.0 ** (attempt - 1)), self.check_stop)

    def _parquet(self, path: str, row: int) -> Iterator[list[str | None]]:
        """By row group, the text column alone, decoded in this thread."""
        import huggingface_hub

        where, hub = f"{self.repo_id}/{path}", huggingface_hub.HfFileSystem()
        url = f"datasets/{self.repo_id}@{self.revision}/{path}"
        # a small file in one transfer, at once; of a large one what is asked for, and not a byte ahead
        cache = "all" if stoppable(lambda: hub.info(url)["size"], self.check_stop) <= SMALL_FILE else "none"
        with stoppable(lambda: hub.open(url, "rb", cache_type=cache), self.check_stop) as opened:
            file = _StoppableFile(opened, self.check_stop)
            column = parquet_text_column(file, self.chosen_column(), where)
            self._remember_column(column)
            yield from read_parquet(file, column, row, where)

    def _copied(self, path: str, row: int) -> Iterator[list[str | None]]:
        """From a copy in the cache, which goes when the file is read."""
        import huggingface_hub

        huggingface_hub.utils.disable_progress_bars()  # that of the preparation stands already
        copy = stoppable(
            lambda: huggingface_hub.hf_hub_download(
                self.repo_id, path, repo_type="dataset", revision=self.revision, local_dir=self.copies
            ),
            self.check_stop,
        )
        try:
            column = self.chosen_column() or find_text_column(copy, None)
            if column is not None:  # the file holds a row
                self._remember_column(column)
                yield from read_rows(copy, column, row)
        except InputError as error:
            raise InputError(str(error).replace(copy, f"{self.repo_id}/{path}")) from None
        Path(copy).unlink()

    def chosen_column(self) -> str | None:
        """The user's choice, else the column that an earlier process chose; None where no row was read yet."""
        if self.text_column is None:
            try:
                self.text_column = str(read_json(self.folder / COLUMN_RECORD)["text_column"])
            except (OSError, ValueError, KeyError):
                return None
        return self.text_column

    def _remember_column(self, column: str) -> None:
        """Records and prints the column that was chosen, at its first use."""
        if self.text_column is None:
            self.text_column = column
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / COLUMN_RECORD, {"text_column": column})
            print(f'{self.where}: text column "{column}"')


def labelled_files(repo_id: str, name: str | None) -> tuple[list[str], object | None, dict[str, list[str]]]:
    """Return a dataset's train split: local copies of its files where this suite reads them, else the table that
    `datasets` makes of them, in the format "arrow"; and the names of classes by column, from the dataset's card.

    Raises whatever `datasets` and the Hub raise.
    """
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    builder = datasets.load_dataset_builder(repo_id, name)
    features = builder.info.features or {}
    classes = {name: list(of.names) for name, of in features.items() if isinstance(of, datasets.ClassLabel)}
    try:
        paths = HubReader(repo_id, name, builder.hash, None, Path(), lambda: None).train_files(builder)
    except InputError:  # its card says how to read it; or the machine is offline, and `datasets` may have its table
        builder.download_and_prepare(verification_mode="no_checks")
        return [], builder.as_dataset(split="train").with_format("arrow"), classes
    revision = builder.hash
    copies = [huggingface_hub.hf_hub_download(repo_id, path, repo_type="dataset", revision=revision) for path in paths]
    return copies, None, classes


class _StoppableFile:
    """A file of the Hub of which no read outlasts a stop."""

    def __init__(self, file: object, check_stop: Callable[[], None]) -> None:
        self._file, self._check_stop = file, check_stop

    def read(self, size: int = -1) -> bytes:
        return stoppable(lambda: self._file.read(size), self._check_stop)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def stoppable(call: Callable[[], object], check_stop: Callable[[], None]) -> object:
    """What `call` returns or raises; and what check_stop raises, as soon as it does, without the end of `call`."""
    results, errors = [], []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="hub", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            check_stop()
            thread.join(0.2)
    except BaseException:
        # at its end the process would wait for the threads with which `datasets` downloads many files, and for all that they are still to do;
        # until then it may start more of them
        threading._register_atexit(_forget_daemon_threads)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _forget_daemon_threads() -> None:
    pools = concurrent.futures.thread
    with pools._global_shutdown_lock:  # a pool holds it from the start of a thread until that is among the queues
        pools._shutdown = True  # and starts none from here on
        for thread in [reference() for reference in pools._threads_queues.keyrefs()]:
            if thread is not None and thread.daemon:
                pools._threads_queues.pop(thread, None)


def wait(seconds: float, check_stop: Callable[[], None]) -> None:
    """Sleeps, and looks for a signal meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check_stop()
        time.sleep(min(0.2, seconds))


def is_network_trouble(error: Exception) -> bool:
    """True for what may go away by itself: connections, time-outs, a server's errors."""
    return any(_is_trouble(behind) for behind in _wrapped(error))


def _is_trouble(error: BaseException) -> bool:
    bases = {base.__name__ for base in type(error).__mro__}  # httpx goes by several names
    if "UnsupportedProtocol" in bases or "LocalProtocolError" in bases:
        return False
    library = type(error).__module__.split(".")[0]
    known = {"TransportError", "HfHubHTTPError", "LocalEntryNotFoundError", "FileMetadataError", "XetDownloadError"}
    return isinstance(error, (ConnectionError, TimeoutError)) or library == "aiohttp" or bool(bases & known)


def refusal(error: Exception, where: str) -> InputError | None:
    """Where the Hub has answered that it will not give what was asked for."""
    for behind in _wrapped(error):
        code = getattr(getattr(behind, "response", None), "status_code", None)
        if (
            code in (401, 403) or type(behind).__name__ == "DatasetNotFoundError"
        ):  # so `datasets` calls files that it may not see
            return InputError(
                f"{where} is open only to whom its owners let in: ask on its page on the Hub, then set HF_TOKEN to your token"
            )
        if code is not None and 400 <= code < 500 and code not in (408, 429):
            return InputError(f"{where}: the Hub refuses it ({first_line(behind)})")
    return None


def _wrapped(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from. `datasets` says of a Hub in trouble that no file is there, without naming the cause as such."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (error.__context__ if isinstance(error, FileNotFoundError) else None)


def first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {lines[0]}"
        if isinstance(error, Exception) and lines
        else str(error) or type(error).__name__
    )
