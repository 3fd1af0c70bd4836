"""How a command that computes on a device ends: Ctrl-C and a lack of memory are one line each."""

import contextlib
import sys
from collections.abc import Iterator

from microbert.errors import Failed
from microbert.runtime.device import out_of_memory
from microbert.runtime.outcome import plain_errors


@contextlib.contextmanager
def plain_device_errors(advice: str) -> Iterator[None]:
    """As `plain_errors`, for commands that compute for long: also report Ctrl-C (exit 130) and a lack of memory.

    advice: what to do about the memory.
    """
    with plain_errors():
        try:
            yield
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise SystemExit(130) from None
        except RuntimeError as error:
            if not (reason := out_of_memory(error)):
                raise
            raise Failed(f"out of memory ({reason}): {advice}") from error
