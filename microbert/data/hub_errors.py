"""Errors of the Hugging Face Hub and of `datasets`: what they mean, and retries of those that may pass."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from microbert.errors import Failed, InputError, Stopped
from microbert.runtime.files import find_shortage
from microbert.runtime.waiting import never_stop

MAX_TRIES = 8  # in a row without a single row read; each wait is twice the one before it
LONGEST_WAIT = 60.0  # seconds

T = TypeVar("T")


class NetworkError(Exception):
    """An error that may pass: a lost connection, a time-out or a server error. The message is one line."""


def retry(call: Callable[[], T], where: str, check_stop: Callable[[], None] = never_stop) -> T:
    """Return what `call` returns. Retry after a network error; report any other error as one of the dataset."""
    attempt = 0
    while True:
        try:
            return call()
        except Exception as error:
            attempt += 1
            wait_or_raise(error, attempt, where, check_stop, is_of_dataset=True)


def wait_or_raise(
    error: Exception, attempt: int, where: str, check_stop: Callable[[], None], is_of_dataset: bool
) -> None:
    """Wait before the next attempt after a network error, longer each time. Raise any other error as `explain` has it.

    attempt: the number of attempts that have failed. where: the dataset's name for messages. Raises Failed after
    MAX_TRIES attempts.
    """
    explained = explain(error, where, is_of_dataset)
    if not isinstance(explained, NetworkError):
        raise explained
    if attempt == MAX_TRIES:
        raise Failed(
            f"reading {where} from the Hub failed {MAX_TRIES} times in a row ({explained}). Everything prepared so far "
            "is saved: run the same command again to resume"
        ) from error
    print(f"warning: reading {where}: {explained}; trying again", file=sys.stderr)
    wait(min(LONGEST_WAIT, 2.0 ** (attempt - 1)), check_stop)


def explain(error: Exception, where: str, is_of_dataset: bool) -> Exception:
    """Return the exception to raise for an error.

    This is NetworkError if a retry may help, InputError if the Hub refuses access, the OSError of a shortage of disk,
    memory or open files; and for any other error an InputError if `is_of_dataset`, else the error itself.
    """
    if isinstance(error, InputError | Failed | Stopped | MemoryError | NetworkError):
        return error
    if shortage := find_shortage(error):
        return shortage
    if refused := refusal(error, where):
        return refused
    if is_network_error(error):
        return NetworkError(first_line(error))
    return InputError(f"{where}: {first_line(error.__cause__ or error)}") if is_of_dataset else error


def wait(seconds: float, check_stop: Callable[[], None] = never_stop) -> None:
    """Sleep, calling `check_stop` at least every 0.2 seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check_stop()
        time.sleep(min(0.2, seconds))


def is_network_error(error: Exception) -> bool:
    """Return whether an error may pass: a lost connection, a time-out or a server error."""
    return any(map(_is_of_network, _chain(error)))


def _is_of_network(error: BaseException) -> bool:
    bases = {base.__name__ for base in type(error).__mro__}  # by name: httpx is installed under several names
    if "UnsupportedProtocol" in bases or "LocalProtocolError" in bases:
        return False
    library = type(error).__module__.split(".")[0]
    known = {"TransportError", "HfHubHTTPError", "LocalEntryNotFoundError", "FileMetadataError", "XetDownloadError"}
    return isinstance(error, ConnectionError | TimeoutError) or library == "aiohttp" or bool(bases & known)


def refusal(error: Exception, where: str) -> InputError | None:
    """Return an InputError if the Hub refuses the request, None for any other error."""
    for each in _chain(error):
        code = getattr(getattr(each, "response", None), "status_code", None)
        # `datasets` raises DatasetNotFoundError for files that it may not read
        if code in (401, 403) or type(each).__name__ == "DatasetNotFoundError":
            return InputError(
                f"{where} is restricted: request access on its page on the Hub, then set HF_TOKEN to your access token"
            )
        if code is not None and 400 <= code < 500 and code not in (408, 429):
            return InputError(f"{where}: the Hub refuses the request ({first_line(each)})")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and its causes.

    `datasets` raises FileNotFoundError for a server error without naming its cause, so for that one the context counts.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (error.__context__ if isinstance(error, FileNotFoundError) else None)


def first_line(error: object) -> str:
    """Return the type and the first line of an exception, or a text as it is."""
    lines = str(error).strip().splitlines()
    if isinstance(error, Exception) and lines:
        return f"{type(error).__name__}: {lines[0]}"
    return str(error) or type(error).__name__
