"""Processes that share work on all cores, and that never outlive the one that started them."""

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool

from microbert.errors import Failed
from microbert.runtime.device import n_cores

MOST_PROCESSES = 6  # one process reads for all of them, and more would wait for it
WORTH_MEGABYTES = 60.0  # of text: with less, starting processes takes as long as the work


def n_workers() -> int:
    """How many processes `open_pool` starts where there is much to do."""
    return min(n_cores(), MOST_PROCESSES)


@contextlib.contextmanager
def open_pool(
    megabytes: float, initializer: Callable[..., None], *arguments: object
) -> Iterator[concurrent.futures.Executor]:
    """A pool for work on so much text: processes, or one thread where there is little to do. Each begins with `initializer(*arguments)`.

    Processes, because most of the work on text holds Python's lock. Raises Failed when one of them is killed.
    """
    if megabytes < WORTH_MEGABYTES or n_workers() == 1:
        pool = concurrent.futures.ThreadPoolExecutor(1, initializer=initializer, initargs=arguments)
    else:  # spawned, because a fork would copy the locks of other threads as they are
        pool = concurrent.futures.ProcessPoolExecutor(
            n_workers(), multiprocessing.get_context("spawn"), _begin, (initializer, *arguments)
        )
    try:
        with pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what has not begun need not be waited for
                raise
    except BrokenProcessPool as error:
        raise Failed(
            "a process that prepares text was killed, perhaps because memory ran out. What is prepared stays: the same command goes on "
            "from here"
        ) from error


def _begin(initializer: Callable[..., None], *arguments: object) -> None:
    """Leaves signals to the process that started this one, and ends with it, whatever ends that."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*arguments)


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
