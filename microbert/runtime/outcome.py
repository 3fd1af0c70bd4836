"""How a command or a run ends: exit codes, and the outcome that status.json holds."""

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Iterator

from microbert.config.terminal import safe_output
from microbert.errors import Failed, InputError
from microbert.runtime.files import system_trouble

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75  # exit codes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What status.json says about a run, apart from the time and the launch.

    state: "running", "done", "stopped" or "failed". exit_code: None while running. rank: of the process that caused
    the outcome. pid, host: of the process that reports it.
    """

    state: str
    exit_code: int | None
    reason: str
    rank: int
    pid: int = dataclasses.field(default_factory=os.getpid)
    host: str = dataclasses.field(default_factory=socket.gethostname)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """For commands: report a known failure in one line, and exit with 2 for bad input or 1 for anything else."""
    with safe_output():
        try:
            yield
        except (InputError, Failed, OSError, MemoryError) as error:
            trouble = system_trouble(error)
            if not trouble and isinstance(error, OSError):
                raise
            print(f"error: {trouble or error}", file=sys.stderr)
            raise SystemExit(BAD_INPUT if isinstance(error, InputError) else FAILED) from None
