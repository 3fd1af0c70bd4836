"""What the user reads about an error that ends a run."""

import contextlib
import errno
from collections.abc import Iterator

from microbert.config.constants import Config
from microbert.config.environment import hub_folder
from microbert.errors import Failed, InputError, Stopped
from microbert.runtime.device import out_of_memory
from microbert.runtime.distributed import lost_process
from microbert.runtime.files import DISK_FULL, find_shortage, system_trouble
from microbert.runtime.outcome import BAD_INPUT, FAILED, STOPPED, Outcome


def outcome_of(error: Exception, rank: int) -> Outcome:
    """Return the outcome of a run that this error ended. rank: of this process."""
    if isinstance(error, InputError):
        return Outcome("failed", BAD_INPUT, str(error), rank)
    if isinstance(error, Stopped):
        return Outcome("stopped", STOPPED, str(error), rank)
    if isinstance(error, Failed):
        return Outcome("failed", FAILED, str(error), rank if error.rank is None else error.rank)
    return Outcome("failed", FAILED, known_failure(error) or f"{type(error).__name__}: {error}", rank)


def known_failure(error: Exception) -> str:
    """Return a line that needs no traceback: out of memory, a lost process, a system error. "" for other errors."""
    if shortage := out_of_memory(error):
        return (
            f"out of memory ({shortage}). If no other program uses the memory, decrease micro_batch_size, vocab_size, "
            "n_embed or n_layers"
        )
    return lost_process(error) or system_trouble(error)


@contextlib.contextmanager
def explain_shortages(config: Config) -> Iterator[None]:
    """Raise Failed, with the remedy, for an error that a full disk or another shortage caused."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        shortage = find_shortage(error)
        if shortage is None:
            raise
        raise Failed(_describe_shortage(shortage, config)) from error


def _describe_shortage(shortage: OSError, config: Config) -> str:
    if shortage.errno not in DISK_FULL:
        return f"{system_trouble(shortage)}. Progress is saved: run the same command to resume"
    places = [shortage.filename] if shortage.filename else [config.output_dir, config.cache_dir, hub_folder(config)]
    problem = "a file is larger than ulimit -f allows" if shortage.errno == errno.EFBIG else "the disk is full"
    return (
        f"{problem} ({' or '.join(str(place) for place in places if place)}). Progress is saved: free space, then run "
        "the same command to resume"
    )
