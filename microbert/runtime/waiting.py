"""Wait for something, and stop waiting when a check raises."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

POLL_SECONDS = 0.05

T = TypeVar("T")


def never_stop() -> None:
    """Do nothing. The default `check_stop`, for callers outside a run."""


def wait_until(condition: Callable[[], bool], check_stop: Callable[[], None] = never_stop) -> None:
    """Poll until `condition()` is true. An exception from `check_stop` ends the wait."""
    while not condition():
        check_stop()
        time.sleep(POLL_SECONDS)


def in_background(call: Callable[[], T], check_stop: Callable[[], None] = never_stop, after: float = 0.0) -> T:
    """Run `call` in a thread, and return its result or raise its exception.

    Use it where `call` blocks in C++, because Python handles no signals there. Meanwhile `check_stop` is called
    repeatedly. An exception from it ends the wait, but not the thread, which ends with the process.
    after: seconds before the first call of `check_stop`.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread, begun = threading.Thread(target=work, daemon=True), time.monotonic()
    thread.start()
    thread.join(POLL_SECONDS)
    while thread.is_alive():
        if time.monotonic() >= begun + after:
            check_stop()
        thread.join(POLL_SECONDS)
    return future.result()
