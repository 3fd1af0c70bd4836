"""A dataset of the Hugging Face Hub as a corpus: which dataset, at which commit, how large.

The Hub is asked once for the dataset's newest commit. The cache records it; later only reading rows needs the network.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from microbert.config.constants import Config
from microbert.config.dataset_names import hub_id
from microbert.config.environment import hub_folder
from microbert.data.corpus import Corpus, Estimate, Part
from microbert.data.hub_dataset import HubDataset, TextColumn
from microbert.data.hub_download import TABLE_PARTS, downloaded_parts
from microbert.data.hub_errors import first_line, is_network_error, refusal, wait
from microbert.data.hub_stream import HubStream
from microbert.data.local_files import EXPANSION, PARQUET_EXPANSION
from microbert.errors import Failed, InputError, Stopped
from microbert.runtime.files import fingerprint, read_json, write_json
from microbert.runtime.waiting import in_background, never_stop

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo

SMALL_CHOICE, LARGE_CHOICE = "Salesforce/wikitext:wikitext-103-raw-v1", "allenai/c4:en"  # the datasets of "hf"
SMALL_CHOICE_SAMPLES = 1_000_000  # the largest max_samples for the first of them
PROBE_SECONDS = 5.0
PROBES = 5
BYTES_A_DOCUMENT = 1000  # if nothing is known
MANY_TIMES = 4  # if a dataset has this many times the documents you want, streaming saves most of the download


def choose_dataset(config: Config) -> tuple[str, str | None, bool]:
    """Return the Hub id, the configuration, and whether to stream, with "hf" resolved."""
    dataset, streaming = config.dataset, config.streaming
    if dataset == "hf":
        is_small = config.max_samples is None or config.max_samples <= SMALL_CHOICE_SAMPLES
        dataset, streaming = SMALL_CHOICE if is_small else LARGE_CHOICE, streaming or not is_small
    found = hub_id(dataset)
    if found is None:
        raise InputError(f'dataset = "{dataset}" is not a Hub id such as "org/name" or "org/name:config"')
    return *found, streaming


def open_hub(config: Config, check_stop: Callable[[], None] = never_stop) -> Corpus:
    """Return the dataset as a corpus, without reading rows yet.

    Raises InputError if the dataset does not exist, is restricted, or cannot be reached within seconds.
    """
    repo_id, name, streaming = choose_dataset(config)
    record = _Record(Path(config.cache_dir) / f"hub-{fingerprint(repo_id, name)}.json", repo_id, name)
    recorded = record.read()
    revision, known = recorded or _ask(repo_id, name, "main", config, check_stop)
    dataset = HubDataset(repo_id, name, revision)
    wanted = known
    if config.max_samples is not None and config.max_samples < known.documents:
        wanted = Estimate(config.max_samples, known.megabytes * config.max_samples / known.documents, known.is_exact)
    # a position in a stream is not one in a download
    way = "streamed" if streaming else f"downloaded, {TABLE_PARTS} parts"
    key = f"{repo_id.split('/')[1]}-{fingerprint(repo_id, name, revision, config.text_column, config.max_samples, way)}"
    folder = Path(config.cache_dir) / key
    copies, text_column = folder / "download", TextColumn(config.text_column, folder, dataset.label)

    def open_parts() -> list[Part]:
        if recorded:
            _check_revision(dataset, config, check_stop)
        if streaming:
            parts = HubStream(dataset, text_column, copies, check_stop).parts()
        else:
            _announce_download(dataset.label, known, wanted, config)
            parts = downloaded_parts(dataset, text_column, check_stop)
        return parts if recorded else [record.written_by(part, revision, known) for part in parts]

    column = text_column.known()
    described = f"{'streamed' if streaming else 'downloaded'} from the Hub" + (
        f', text column "{column}"' if column else ""
    )
    origin = f"as recorded; delete {record.path} to look for a newer one" if recorded else "its newest"
    return Corpus(
        f"{dataset.label} ({described})",
        key,
        open_parts,
        wanted,
        config.max_samples,
        is_remote=streaming,
        remember=lambda: shutil.rmtree(copies, ignore_errors=True),
        notes=(f"Hub: {dataset.label} at commit {revision[:12]}, {origin}",),
    )


@dataclasses.dataclass(frozen=True)
class _Record:
    """The file in the cache that pins a dataset's commit and its size there."""

    path: Path
    repo_id: str
    name: str | None

    def read(self) -> tuple[str, Estimate] | None:
        try:
            record = read_json(self.path)
            return str(record["revision"]), Estimate(
                int(record["documents"]), float(record["megabytes"]), bool(record["is_exact"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def written_by(self, part: Part, revision: str, known: Estimate) -> Part:
        """Return the part, whose first row writes the record: after an earlier failure, the next run asks again."""

        def read(row: int) -> Iterator[list[str | None]]:
            for rows in part.read(row):
                if not self.path.exists():
                    pinned = {"dataset": self.repo_id, "configuration": self.name, "revision": revision}
                    write_json(self.path, pinned | dataclasses.asdict(known))
                yield rows

        return Part(part.size, read)


def _check_revision(dataset: HubDataset, config: Config, check_stop: Callable[[], None]) -> None:
    """Raise InputError if the Hub cannot be reached, or offline if `datasets` has another commit in its cache."""
    found, _ = _ask(dataset.repo_id, dataset.name, dataset.revision, config, check_stop)
    if found != dataset.revision:
        problem = f"offline, and the cache of datasets holds commit {found[:12]}, not {dataset.revision[:12]}"
        raise _unreachable(dataset.repo_id, config, problem)


def _announce_download(label: str, known: Estimate, wanted: Estimate, config: Config) -> None:
    about = "" if known.is_exact else "about "
    print(
        f"downloading all of {label} to {hub_folder(config)}, unless it is there already: {about}{known.documents:,} "
        f"documents, about {known.megabytes:,.0f} MB of text"
    )
    if known.documents > MANY_TIMES * wanted.documents:
        print(
            f"max_samples = {config.max_samples:,} needs only a small part of it: --streaming would transfer little "
            "more than that part"
        )
    sys.stdout.flush()  # the download may take hours


def _ask(
    repo_id: str, name: str | None, revision: str, config: Config, check_stop: Callable[[], None]
) -> tuple[str, Estimate]:
    """Return the commit and the dataset's size, from one request, which is retried while the Hub has trouble."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    if datasets.config.HF_HUB_OFFLINE:
        return _find_in_cache(repo_id, name, config)
    _check_settings()
    api, where = huggingface_hub.HfApi(), f'dataset = "{config.dataset}"'
    attempt = 0
    while True:
        attempt += 1
        try:
            info = in_background(
                lambda: api.dataset_info(repo_id, revision=revision, files_metadata=True, timeout=PROBE_SECONDS),
                check_stop,
            )
            return _commit(info), _estimate(info, name)
        except (Stopped, Failed):
            raise
        except OfflineModeIsEnabled:
            return _find_in_cache(repo_id, name, config)
        except (RepositoryNotFoundError, HFValidationError) as error:
            if isinstance(error, GatedRepoError) and (refused := refusal(error, where)):
                raise refused from None
            raise InputError(
                f"{where} is not a file or folder here, and the Hub has no dataset of that name "
                "(if it is private, set HF_TOKEN to your access token)"
            ) from None
        except Exception as error:
            if refused := refusal(error, where):
                raise refused from None
            if not is_network_error(error):
                raise
            # without a connection, more attempts would only delay the error
            if "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:
                raise _unreachable(repo_id, config, error) from None
            if attempt == PROBES:
                raise Failed(
                    f"the Hugging Face Hub has trouble ({first_line(error)}); run the same command again later"
                ) from None
            print(f"warning: the Hub has trouble ({first_line(error)}); asking again", file=sys.stderr)
        wait(2.0 ** (attempt - 1), check_stop)


def _commit(info: "DatasetInfo") -> str:
    if info.sha is None:
        raise Failed(f"the Hugging Face Hub names no commit of {info.id}")
    return info.sha


def _check_settings() -> None:
    """Raise InputError if HF_ENDPOINT or the token cannot be used for a request."""
    import huggingface_hub

    endpoint, token = huggingface_hub.constants.ENDPOINT, huggingface_hub.get_token()
    try:
        address = urlsplit(endpoint)
        is_address = address.scheme in ("http", "https") and bool(address.hostname)
    except ValueError:
        is_address = False
    if not is_address:
        raise InputError(f"HF_ENDPOINT = {endpoint!r} is not the address of a Hub: start it with https:// or http://")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError("HF_TOKEN contains characters that no token has; copy it again from your settings on the Hub")


def _estimate(info: "DatasetInfo", name: str | None) -> Estimate:
    """Return the size that the dataset's card states, else an estimate from the sizes of all its files."""
    try:
        n_documents, n_bytes = _counts_of_card(info.card_data, name)
    except Exception:  # a card may hold anything
        n_documents, n_bytes = 0, 0
    if n_documents > 0:
        return Estimate(n_documents, (n_bytes or n_documents * BYTES_A_DOCUMENT) / 1e6, is_exact=True)
    files = info.siblings or []
    n_stored = sum((file.size or 0) for file in files if not file.rfilename.endswith((".md", ".gitattributes", ".py")))
    is_parquet = any(file.rfilename.endswith(".parquet") for file in files)
    size = n_stored * (PARQUET_EXPANSION if is_parquet else EXPANSION)
    return Estimate(max(1, round(size / BYTES_A_DOCUMENT)), size / 1e6)


def _counts_of_card(card: object, name: str | None) -> tuple[int, int]:
    """Return the numbers of rows and bytes of the train split, 0 if the card does not state them."""
    from datasets.info import DatasetInfosDict

    configurations = DatasetInfosDict.from_dataset_card_data(card) if card else {}
    if name:
        chosen = configurations.get(name)
    else:
        chosen = next(iter(configurations.values())) if len(configurations) == 1 else None
    train = (chosen.splits or {}).get("train") if chosen else None
    return (int(train.num_examples or 0), int(train.num_bytes or 0)) if train else (0, 0)


def _find_in_cache(repo_id: str, name: str | None, config: Config) -> tuple[str, Estimate]:
    """Return the commit and size of an earlier download through `datasets` in HF_HOME, for an offline machine."""
    import datasets

    if choose_dataset(config)[2]:
        raise _unreachable(repo_id, config, "offline, and streaming = True needs a network")
    try:
        builder = datasets.load_dataset_builder(repo_id, name)
    except (OSError, ValueError) as error:
        raise _unreachable(repo_id, config, error) from None
    train = (builder.info.splits or {}).get("train")
    if not train:
        raise _unreachable(repo_id, config, "offline, and the cache of datasets has no train split of it")
    return builder.hash, Estimate(train.num_examples, train.num_bytes / 1e6, is_exact=True)


def _unreachable(repo_id: str, config: Config, error: object) -> InputError:
    folder = repo_id.split("/")[1]
    return InputError(
        f'dataset = "{config.dataset}": the Hugging Face Hub cannot be reached ({first_line(error)}), and '
        f"{config.cache_dir} holds no prepared copy. On a machine with a network, either run the same command with "
        f"--prepare-only and copy {config.cache_dir} here, or run "
        f'"hf download --repo-type dataset {repo_id} --local-dir {folder}" and pass the training files, such as '
        f'--dataset "{folder}/**/*train*". To use an earlier download by datasets, set HF_HUB_OFFLINE=1 and omit '
        "--streaming.\n"
        "--dataset imdb, or a path of your own files, needs no network"
    )
