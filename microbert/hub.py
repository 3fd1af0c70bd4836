"""A dataset of the Hugging Face Hub as a corpus: downloaded through `datasets`, or streamed file by file.

The Hub is asked for the dataset's newest commit once; from then on the cache remembers it, and only reading rows needs the network.
Streaming reads parquet files by row group (the text column alone), and other files one after another through a temporary copy, because
`datasets` transfers the beginning of the first of them twice; and a parquet stream that it leaves unfinished can abort the process at its end.
"""

import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from .config import Config, InputError, hub_id
from .documents import READ_ROWS, Corpus, Estimate, Part, choose_text_column, text_rows
from .files import fingerprint, read_json, write_json
from .local_files import EXPANSION, PARQUET_EXPANSION, read_tables
from .run import Failed

SMALL_CHOICE, LARGE_CHOICE = "Salesforce/wikitext:wikitext-103-raw-v1", "allenai/c4:en"  # what "hf" stands for
SMALL_CHOICE_SAMPLES = 1_000_000  # and up to how many samples the first will do
PROBE_SECONDS = 5.0
PROBES = 5
TRIES = 8  # in a row without a single row read, each of which waits twice as long as the one before it
LONGEST_WAIT = 60.0
SMALL_FILE = 8_000_000  # bytes
TABLE_PARTS = 100  # of a downloaded dataset, so that the tokenizer's sample is spread over it
KINDS = ("parquet", "json", "csv", "text")
BYTES_A_DOCUMENT = 1000  # where nothing is known


def choose_dataset(config: Config) -> tuple[str, str | None, bool]:
    """The Hub id, the configuration, and whether to stream, with "hf" made out."""
    if config.dataset != "hf":
        return *hub_id(config.dataset), config.streaming
    is_small = config.max_samples is None or config.max_samples <= SMALL_CHOICE_SAMPLES
    return *hub_id(SMALL_CHOICE if is_small else LARGE_CHOICE), config.streaming or not is_small


def open_hub(config: Config, check_stop: Callable[[], None]) -> Corpus:
    """Raises InputError where the dataset does not exist, may not be read, or cannot be reached within some seconds."""
    repo_id, name, streaming = choose_dataset(config)
    record_path = Path(config.cache_dir) / f"hub-{fingerprint(repo_id, name)}.json"
    try:
        record = read_json(record_path)
        known = Estimate(int(record["documents"]), float(record["megabytes"]), bool(record["is_exact"]))
        revision, from_record = record["revision"], True
    except (OSError, ValueError, KeyError, TypeError):
        revision, known = _ask(repo_id, name, config, check_stop)
        from_record = False
    estimate = known
    if config.max_samples is not None and config.max_samples < known.documents:
        estimate = Estimate(config.max_samples, known.megabytes * config.max_samples / known.documents, known.is_exact)
    key = f"{repo_id.split('/')[1]}-{fingerprint(repo_id, name, revision, config.text_column, config.max_samples)}"
    copies = Path(config.cache_dir) / key / "download"

    def open_parts() -> list[Part]:
        write_json(record_path, {"dataset": repo_id, "configuration": name, "revision": revision, "documents": known.documents,
                                 "megabytes": known.megabytes, "is_exact": known.is_exact})
        reader = _Reader(repo_id, name, revision, config.text_column, copies, check_stop)
        return reader.streamed_parts() if streaming else reader.downloaded_parts()

    label = repo_id if name is None else f"{repo_id}:{name}"
    how = "as recorded" if from_record else "its newest"
    print(f"Hub: {label} at commit {revision[:12]}, {how}" + (f"; delete {record_path} to look for a newer one" if from_record else ""))
    return Corpus(f"{label} ({'streamed from' if streaming else 'downloaded from'} the Hub)", key, open_parts, estimate, config.max_samples,
                  is_remote=streaming, remember=lambda: shutil.rmtree(copies, ignore_errors=True))


def _ask(repo_id: str, name: str | None, config: Config, check_stop: Callable[[], None]) -> tuple[str, Estimate]:
    """The newest commit and what the dataset holds, from one request that is made again while the Hub has trouble."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    for attempt in range(1, PROBES + 1):
        try:
            info = huggingface_hub.HfApi().dataset_info(repo_id, revision="main", files_metadata=True, timeout=PROBE_SECONDS)
            return info.sha, _estimate(info, name)
        except OfflineModeIsEnabled:
            return _find_in_cache(repo_id, name, config)
        except GatedRepoError:
            raise InputError(f'dataset = "{config.dataset}" is open only to whom its owners let in: ask on its page on the Hub, '
                             "then set HF_TOKEN to your token") from None
        except (RepositoryNotFoundError, HFValidationError):
            raise InputError(f'dataset = "{config.dataset}" is no file or folder here, and no dataset of that name is on the Hub '
                             "(or it is private: then set HF_TOKEN)") from None
        except Exception as error:
            response = getattr(error, "response", None)
            if isinstance(error, HfHubHTTPError) and response is not None and response.status_code < 500 and response.status_code not in (408, 429):
                raise InputError(f'dataset = "{config.dataset}": the Hub refuses it ({_first_line(error)})') from None
            if not is_network_trouble(error):
                raise
            if "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:  # nobody there: no use in waiting
                raise _unreachable(repo_id, config, error) from None
            if attempt == PROBES:
                raise Failed(f"the Hugging Face Hub has trouble ({_first_line(error)}); try the same command again later") from None
            print(f"the Hub has trouble ({_first_line(error)}); asking again")
            wait(2.0 ** (attempt - 1), check_stop)


def _estimate(info: object, name: str | None) -> Estimate:
    """From the dataset's card where that counts its rows, else from the sizes of all its files."""
    from datasets.info import DatasetInfosDict

    with_splits = DatasetInfosDict.from_dataset_card_data(info.card_data) if info.card_data else {}
    of_name = with_splits.get(name) if name else next(iter(with_splits.values()), None) if len(with_splits) == 1 else None
    train = (of_name.splits or {}).get("train") if of_name else None
    if train and train.num_examples:
        return Estimate(train.num_examples, (train.num_bytes or train.num_examples * BYTES_A_DOCUMENT) / 1e6, is_exact=True)
    size = sum((file.size or 0) for file in info.siblings if not file.rfilename.endswith((".md", ".gitattributes", ".py")))
    is_parquet = any(file.rfilename.endswith(".parquet") for file in info.siblings)
    size *= PARQUET_EXPANSION if is_parquet else EXPANSION
    return Estimate(max(1, round(size / BYTES_A_DOCUMENT)), size / 1e6)


def _find_in_cache(repo_id: str, name: str | None, config: Config) -> tuple[str, Estimate]:
    """What an earlier download through `datasets` has left in HF_HOME, for a machine that is set to be offline."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(repo_id, name)
    except (OSError, ValueError) as error:
        raise _unreachable(repo_id, config, error) from None
    train = (builder.info.splits or {}).get("train")
    if not train:
        raise _unreachable(repo_id, config, "offline, and the cache holds no train split")
    return builder.hash, Estimate(train.num_examples, train.num_bytes / 1e6, is_exact=True)


def _unreachable(repo_id: str, config: Config, error: object) -> InputError:
    folder = repo_id.split("/")[1]
    return InputError(
        f'dataset = "{config.dataset}": the Hugging Face Hub cannot be reached ({_first_line(error)}), and it is not prepared in {config.cache_dir}. '
        f"Where there is a network, run this with --prepare-only and copy {config.cache_dir} here, or fetch the files with "
        f'"hf download --repo-type dataset {repo_id} --local-dir {folder}" and give --dataset {folder}. '
        "What datasets has downloaded before is found with HF_HUB_OFFLINE=1.\n"
        "--dataset imdb, or a path of your own files, needs no network")


class _Reader:
    """Opens the parts of one commit of a dataset."""

    def __init__(self, repo_id: str, name: str | None, revision: str, text_column: str | None, copies: Path, check_stop: Callable[[], None]) -> None:
        self.repo_id, self.name, self.revision = repo_id, name, revision
        self.where = repo_id if name is None else f"{repo_id}:{name}"
        self.text_column = text_column
        self.copies = copies
        self.check_stop = check_stop

    def downloaded_parts(self) -> list[Part]:
        """Pieces of the table that `datasets` keeps in HF_HOME, all of it downloaded now where that was not done before."""
        import datasets

        self._builder()
        rows = self._persist(lambda: self._load(lambda **revision: datasets.load_dataset(
            self.repo_id, self.name, split="train", verification_mode="no_checks", **revision)))  # cards often lag behind their files
        rows = rows.with_format("arrow")
        column = choose_text_column(rows[:1], self.text_column, self.where)
        rows = rows.select_columns([column])

        def part(first: int, end: int) -> Part:
            def read(row: int) -> Iterator[list[str | None]]:
                for start in range(first + row, end, READ_ROWS):
                    yield text_rows(rows[start : min(end, start + READ_ROWS)], column, self.where)

            return Part(end - first, read)

        step = max(1, -(-len(rows) // TABLE_PARTS))
        return [part(first, min(first + step, len(rows))) for first in range(0, len(rows), step)]

    def streamed_parts(self) -> list[Part]:
        """The files of the train split, none of them touched before its turn."""
        builder = self._builder()
        kind = next((base.__name__.lower() for base in type(builder).__mro__ if base.__name__.lower() in KINDS), None)
        if kind is None:
            raise InputError(f"{self.where} holds files of another kind than {', '.join(KINDS)}; try it without --streaming")
        files = (builder.config.data_files or {}).get("train")
        if not files:
            raise InputError(f"{self.where} has no train split; it has: {', '.join(map(str, builder.config.data_files or {})) or 'no files'}")
        paths = [file.removeprefix("hf://").split("@")[1].split("/", 1)[1] for file in files]
        return [Part(1, lambda row, path=path: self._read(path, kind, row)) for path in paths]

    def _builder(self) -> object:
        """What `datasets` knows of the dataset. Raises InputError where a configuration has to be named."""
        import datasets

        builder = self._persist(lambda: self._load(lambda **revision: datasets.load_dataset_builder(self.repo_id, self.name, **revision)))
        names = list(builder.builder_configs)
        if self.name is None and len(names) > 1 and "default" not in names:
            raise InputError(f'dataset = "{self.repo_id}" has several configurations, such as "{self.repo_id}:{names[0]}"; it has: {", ".join(names)}')
        return builder

    def _load(self, load: Callable[..., object]) -> object:
        """Calls `load(revision=...)`, without a revision where the machine is offline, and makes its errors those of this suite."""
        import datasets
        from datasets.data_files import EmptyDatasetError
        from datasets.exceptions import DatasetBuildError, DatasetNotFoundError

        datasets.disable_progress_bars()
        try:
            loaded = load() if datasets.config.HF_HUB_OFFLINE else load(revision=self.revision)
        except (ValueError, DatasetNotFoundError, EmptyDatasetError, DatasetBuildError) as error:
            if isinstance(error, DatasetBuildError) and is_network_trouble(error):
                raise
            raise InputError(f"{self.where}: {_first_line(error.__cause__ or error)}") from None
        return loaded

    def _persist(self, call: Callable[[], object]) -> object:
        for attempt in itertools.count(1):
            try:
                return call()
            except Exception as error:
                self._wait_out(error, attempt)

    def _read(self, path: str, kind: str, row: int) -> Iterator[list[str | None]]:
        """The text column of a file from `row` on. Trouble on the way is waited out, and reading goes on behind the last row."""
        read, attempt = self._parquet if kind == "parquet" else self._copied, 0
        while True:
            try:
                for rows in read(path, row):
                    yield rows
                    row, attempt = row + len(rows), 0
                return
            except Exception as error:
                attempt += 1
                self._wait_out(error, attempt)

    def _wait_out(self, error: Exception, attempt: int) -> None:
        """Waits after trouble with the network, longer each time; raises any other error, and Failed when it has waited long enough."""
        if not is_network_trouble(error):
            raise error
        if attempt == TRIES:
            raise Failed(f"reading {self.where} from the Hub failed {TRIES} times in a row ({_first_line(error)}). What is prepared stays: the same "
                         "command goes on from here") from error
        print(f"reading {self.where}: {_first_line(error)}; trying again", file=sys.stderr)
        wait(min(LONGEST_WAIT, 2.0 ** (attempt - 1)), self.check_stop)

    def _parquet(self, path: str, row: int) -> Iterator[list[str | None]]:
        """By row group, the text column alone, in this thread."""
        import huggingface_hub
        import pyarrow.parquet

        name, hub = f"{self.repo_id}/{path}", huggingface_hub.HfFileSystem()
        url = f"datasets/{self.repo_id}@{self.revision}/{path}"
        # a small file in one transfer; of a large one what is asked for, and not a byte ahead
        with hub.open(url, "rb", cache_type="all" if hub.info(url)["size"] <= SMALL_FILE else "none") as file:
            try:
                table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
                self.text_column = choose_text_column(table.schema_arrow.empty_table(), self.text_column, name)
                for group in range(table.num_row_groups):
                    n_rows = table.metadata.row_group(group).num_rows
                    if row < n_rows:
                        for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=[self.text_column], use_threads=False):
                            rows = text_rows(pa.Table.from_batches([batch]), self.text_column, name)
                            if row < len(rows):
                                yield rows[row:]
                            row = max(0, row - len(rows))
                    else:
                        row -= n_rows
            except pa.ArrowException as error:
                raise InputError(f"{name} cannot be read as parquet: {_first_line(error)}") from error

    def _copied(self, path: str, row: int) -> Iterator[list[str | None]]:
        """From a copy in the cache, which goes when the file is read."""
        import huggingface_hub

        huggingface_hub.utils.disable_progress_bars()
        copy = huggingface_hub.hf_hub_download(self.repo_id, path, repo_type="dataset", revision=self.revision, local_dir=self.copies)
        for table in read_tables(copy, row):
            self.text_column = choose_text_column(table, self.text_column, f"{self.repo_id}/{path}")
            yield text_rows(table, self.text_column, f"{self.repo_id}/{path}")
        Path(copy).unlink()


def is_network_trouble(error: BaseException) -> bool:
    """True for what may go away by itself: connections, time-outs, a server's errors, also where a library has wrapped them."""
    while error is not None:
        if isinstance(error, InputError):
            return False
        library = type(error).__module__.split(".")[0]
        if isinstance(error, (ConnectionError, TimeoutError, FileNotFoundError)) or library.startswith("httpx") or library == "huggingface_hub":
            return True
        error = error.__cause__ or error.__context__
    return False


def wait(seconds: float, check_stop: Callable[[], None]) -> None:
    """Sleeps, and looks for a signal meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check_stop()
        time.sleep(min(0.2, seconds))


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if isinstance(error, Exception) and lines else str(error) or type(error).__name__
