"""A dataset of the Hugging Face Hub as a corpus: which one, at which commit, how large.

The Hub is asked for the dataset's newest commit once; from then on the cache remembers it, and only reading rows needs the network.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from microbert.config.constants import Config
from microbert.config.dataset_names import hub_id
from microbert.config.environment import hub_folder
from microbert.data.corpus import Corpus, Estimate, Part
from microbert.data.hub_reader import TABLE_PARTS, HubReader, first_line, is_network_trouble, refusal, stoppable, wait
from microbert.data.local_files import EXPANSION, PARQUET_EXPANSION
from microbert.errors import Failed, InputError, Stopped
from microbert.runtime.files import fingerprint, read_json, write_json

SMALL_CHOICE, LARGE_CHOICE = "Salesforce/wikitext:wikitext-103-raw-v1", "allenai/c4:en"  # what "hf" stands for
SMALL_CHOICE_SAMPLES = 1_000_000  # and up to how many samples the first will do
PROBE_SECONDS = 5.0
PROBES = 5
BYTES_A_DOCUMENT = 1000  # where nothing is known
MANY_TIMES = 4  # more documents than are wanted: then streaming saves much of a download


def choose_dataset(config: Config) -> tuple[str, str | None, bool]:
    """The Hub id, the configuration, and whether to stream, with "hf" made out."""
    if config.dataset != "hf":
        return *hub_id(config.dataset), config.streaming
    is_small = config.max_samples is None or config.max_samples <= SMALL_CHOICE_SAMPLES
    return *hub_id(SMALL_CHOICE if is_small else LARGE_CHOICE), config.streaming or not is_small


def open_hub(config: Config, check_stop: Callable[[], None]) -> Corpus:
    """Raises InputError where the dataset does not exist, may not be read, or cannot be reached within some seconds."""
    repo_id, name, streaming = choose_dataset(config)
    label = repo_id if name is None else f"{repo_id}:{name}"
    record_path = Path(config.cache_dir) / f"hub-{fingerprint(repo_id, name)}.json"
    recorded = _read_record(record_path)
    revision, known = recorded or _ask(repo_id, name, "main", config, check_stop)
    wanted = known
    if config.max_samples is not None and config.max_samples < known.documents:
        wanted = Estimate(config.max_samples, known.megabytes * config.max_samples / known.documents, known.is_exact)
    way = (
        "streamed" if streaming else f"downloaded, {TABLE_PARTS} parts"
    )  # a position in the one means nothing in the other
    key = f"{repo_id.split('/')[1]}-{fingerprint(repo_id, name, revision, config.text_column, config.max_samples, way)}"
    reader = HubReader(repo_id, name, revision, config.text_column, Path(config.cache_dir) / key, check_stop)

    def open_parts() -> list[Part]:
        if recorded:
            found, _ = _ask(repo_id, name, revision, config, check_stop)
            if found != revision:
                raise _unreachable(
                    repo_id,
                    config,
                    f"offline, and the cache of datasets holds commit {found[:12]}, not {revision[:12]}",
                )
        if not streaming:
            _announce_download(label, known, wanted, config)
        parts = reader.streamed_parts() if streaming else reader.downloaded_parts()
        return (
            parts
            if recorded
            else [Part(part.size, lambda row, part=part: _recording(part.read(row))) for part in parts]
        )

    def _recording(batches: Iterator[list[str | None]]) -> Iterator[list[str | None]]:
        """Pins the commit as soon as a row of it has been read: a run that fails before leaves the next one free to look again."""
        for rows in batches:
            if not record_path.exists():
                write_json(
                    record_path,
                    {
                        "dataset": repo_id,
                        "configuration": name,
                        "revision": revision,
                        "documents": known.documents,
                        "megabytes": known.megabytes,
                        "is_exact": known.is_exact,
                    },
                )
            yield rows

    print(
        f"Hub: {label} at commit {revision[:12]}, "
        + (f"as recorded; delete {record_path} to look for a newer one" if recorded else "its newest")
    )
    column = reader.chosen_column()
    described = f"{'streamed' if streaming else 'downloaded'} from the Hub"
    if column:
        described += f', text column "{column}"'
    return Corpus(
        f"{label} ({described})",
        key,
        open_parts,
        wanted,
        config.max_samples,
        is_remote=streaming,
        remember=lambda: shutil.rmtree(reader.copies, ignore_errors=True),
    )


def _read_record(path: Path) -> tuple[str, Estimate] | None:
    """The commit that this cache was made from, and what the dataset holds there."""
    try:
        record = read_json(path)
        return str(record["revision"]), Estimate(
            int(record["documents"]), float(record["megabytes"]), bool(record["is_exact"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _announce_download(label: str, known: Estimate, wanted: Estimate, config: Config) -> None:
    about = "" if known.is_exact else "about "
    print(
        f"downloading all of {label} to {hub_folder(config)}, where it is not there yet: {about}{known.documents:,} documents, "
        f"about {known.megabytes:,.0f} MB of text"
    )
    if known.documents > MANY_TIMES * wanted.documents:
        print(
            f"max_samples = {config.max_samples:,} needs a small part of that: --streaming would transfer little more than this part"
        )
    sys.stdout.flush()  # what follows may take hours


def _ask(
    repo_id: str, name: str | None, revision: str, config: Config, check_stop: Callable[[], None]
) -> tuple[str, Estimate]:
    """The commit and what the dataset holds, from one request that is made again while the Hub has trouble."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    if datasets.config.HF_HUB_OFFLINE:
        return _find_in_cache(repo_id, name, config)
    _check_settings()
    api = huggingface_hub.HfApi()
    for attempt in range(1, PROBES + 1):
        try:
            info = stoppable(
                lambda: api.dataset_info(repo_id, revision=revision, files_metadata=True, timeout=PROBE_SECONDS),
                check_stop,
            )
            return info.sha, _estimate(info, name)
        except Stopped:
            raise
        except OfflineModeIsEnabled:
            return _find_in_cache(repo_id, name, config)
        except (RepositoryNotFoundError, HFValidationError) as error:
            if isinstance(error, GatedRepoError):
                raise refusal(error, f'dataset = "{config.dataset}"') from None
            raise InputError(
                f'dataset = "{config.dataset}" is no file or folder here, and no dataset of that name is on the Hub '
                "(or it is private: then set HF_TOKEN)"
            ) from None
        except Exception as error:
            if refused := refusal(error, f'dataset = "{config.dataset}"'):
                raise refused from None
            if not is_network_trouble(error):
                raise
            if (
                "Connect" in type(error).__name__ or "Timeout" in type(error).__name__
            ):  # nobody there: no use in waiting
                raise _unreachable(repo_id, config, error) from None
            if attempt == PROBES:
                raise Failed(
                    f"the Hugging Face Hub has trouble ({first_line(error)}); try the same command again later"
                ) from None
            print(f"the Hub has trouble ({first_line(error)}); asking again")
        wait(2.0 ** (attempt - 1), check_stop)


def _check_settings() -> None:
    """Raises InputError for a setting of the environment that no request can be made with."""
    import huggingface_hub

    endpoint, token = huggingface_hub.constants.ENDPOINT, huggingface_hub.get_token()
    try:
        address = urlsplit(endpoint)
        is_address = address.scheme in ("http", "https") and bool(address.hostname)
    except ValueError:
        is_address = False
    if not is_address:
        raise InputError(f"HF_ENDPOINT = {endpoint!r} is no address of a Hub: it must begin with https:// or http://")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError(
            "HF_TOKEN holds characters that no token has; copy it again from the Hub's page of your settings"
        )


def _estimate(info: object, name: str | None) -> Estimate:
    """From the dataset's card where that counts its rows, else from the sizes of all its files."""
    try:
        n_documents, n_bytes = _counted_in_card(info.card_data, name)
    except Exception:  # a card may hold anything
        n_documents, n_bytes = 0, 0
    if n_documents > 0:
        return Estimate(n_documents, (n_bytes or n_documents * BYTES_A_DOCUMENT) / 1e6, is_exact=True)
    size = sum(
        (file.size or 0) for file in info.siblings if not file.rfilename.endswith((".md", ".gitattributes", ".py"))
    )
    is_parquet = any(file.rfilename.endswith(".parquet") for file in info.siblings)
    size *= PARQUET_EXPANSION if is_parquet else EXPANSION
    return Estimate(max(1, round(size / BYTES_A_DOCUMENT)), size / 1e6)


def _counted_in_card(card: object, name: str | None) -> tuple[int, int]:
    """The training split's rows and bytes, 0 where the card does not say."""
    from datasets.info import DatasetInfosDict

    with_splits = DatasetInfosDict.from_dataset_card_data(card) if card else {}
    of_name = (
        with_splits.get(name) if name else next(iter(with_splits.values()), None) if len(with_splits) == 1 else None
    )
    train = (of_name.splits or {}).get("train") if of_name else None
    return (int(train.num_examples or 0), int(train.num_bytes or 0)) if train else (0, 0)


def _find_in_cache(repo_id: str, name: str | None, config: Config) -> tuple[str, Estimate]:
    """What an earlier download through `datasets` has left in HF_HOME, for a machine that is set to be offline."""
    import datasets

    if choose_dataset(config)[2]:
        raise _unreachable(repo_id, config, "offline, and streaming = True needs it")
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
        f'dataset = "{config.dataset}": the Hugging Face Hub cannot be reached ({first_line(error)}), and it is not prepared in {config.cache_dir}. '
        f"Where there is a network, run this with --prepare-only and copy {config.cache_dir} here, or fetch the files with "
        f'"hf download --repo-type dataset {repo_id} --local-dir {folder}" and give the training files among them, such as '
        f'--dataset "{folder}/**/*train*". What datasets has downloaded before is found with HF_HUB_OFFLINE=1 and without --streaming.\n'
        "--dataset imdb, or a path of your own files, needs no network"
    )
