"""Call a handler on Ctrl-C, SIGTERM and SIGHUP.

`Run.note_stop` records the signal; the loop (train/loop.py) then saves a checkpoint and stops.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")  # SIGHUP: the terminal was closed; Windows has no SIGHUP


def handled_signals() -> list[str]:
    """Return those of STOP_SIGNALS that this process handles, without ignored ones, such as SIGHUP under nohup.

    Python handles signals in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [
        name
        for name in STOP_SIGNALS
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN
    ]


@contextlib.contextmanager
def on_stop_signal(handle: Callable[[str], None]) -> Iterator[None]:
    """Within the block, call `handle` with the name of each signal of `handled_signals`."""
    previous = {
        name: signal.signal(getattr(signal, name), lambda *_, name=name: handle(name)) for name in handled_signals()
    }
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)
