"""A pool of processes that uses all cores, and ends with the process that started it."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool

from microbert.errors import Failed
from microbert.runtime.child_process import end_with_parent
from microbert.runtime.device import n_cores

MOST_PROCESSES = 6  # a single process reads the text, and would not keep more of them busy
WORTH_MEGABYTES = 60.0  # of text: below this, starting processes takes as long as the work


def n_workers() -> int:
    """Return the number of processes that `open_pool` starts for a large text."""
    return min(n_cores(), MOST_PROCESSES)


@contextlib.contextmanager
def open_pool(
    megabytes: float, initializer: Callable[..., None], *arguments: object
) -> Iterator[concurrent.futures.Executor]:
    """Open a pool for a text of this size: processes, or one thread for a small text.

    Each worker first calls `initializer(*arguments)`. Processes, because most of the work holds Python's global
    interpreter lock. Raises Failed if one of them is killed.
    """
    begin = functools.partial(initializer, *arguments)
    pool: concurrent.futures.Executor
    if megabytes < WORTH_MEGABYTES or n_workers() == 1:
        pool = concurrent.futures.ThreadPoolExecutor(1, initializer=begin)
    else:  # spawned, because a fork would copy locks that other threads hold
        context = multiprocessing.get_context("spawn")
        begin = functools.partial(_begin_process, initializer, *arguments)
        pool = concurrent.futures.ProcessPoolExecutor(n_workers(), context, begin)
    try:
        with pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)  # do not wait for tasks that have not started
                raise
    except BrokenProcessPool as error:
        raise Failed(
            "a process that prepares text was killed, perhaps because memory ran out. Prepared data is saved: run the "
            "same command to resume"
        ) from error


def _begin_process(initializer: Callable[..., None], *arguments: object) -> None:
    """Ignore signals, which the parent process handles, and end when the parent ends for any reason."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    initializer(*arguments)
