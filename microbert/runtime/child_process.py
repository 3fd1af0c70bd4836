"""Run one call in a child process that can be killed at any time and never outlives this process."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

from microbert.config.terminal import safe_output
from microbert.errors import Failed
from microbert.runtime.waiting import never_stop

POLL_SECONDS = 0.1
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # a terminal or a scheduler may send them to the child as well

T = TypeVar("T")


def call_in_child(call: Callable[..., T], *arguments: object, check_stop: Callable[[], None] = never_stop) -> T:
    """Return what `call(*arguments)` returns in a child process, or raise what it raises.

    Use it for a long call that starts threads which Python joins at exit: they end with the child, which is killed.
    The child is spawned, not forked, because a fork copies locks that other threads hold. It has to import the module
    of `call`, so make a short call with `in_background` instead. `call`, its arguments, its result and its errors must
    be picklable, and the script that runs must have an `if __name__ == "__main__":` guard, because the child imports
    it. `call` should create no semaphores of multiprocessing: Python reports them as leaked after a kill.

    check_stop: called every POLL_SECONDS; an exception that it raises ends the child. Raises Failed if something else
    kills the child, or it cannot start.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(sender, call, arguments), name="call_in_child")
    _start(child)
    sender.close()  # the child's copy is the only one, so its death ends the pipe
    try:
        while not receiver.poll(POLL_SECONDS):
            check_stop()
        has_returned, outcome = receiver.recv()
    except EOFError:
        child.join()
        if child.exitcode is not None and child.exitcode < 0:
            reason = "a child process was killed, perhaps because memory ran out; run the same command again"
        else:
            reason = (
                "a child process ended before its work, with the error above; a script of your own needs "
                '`if __name__ == "__main__":` around what it runs'
            )
        raise Failed(reason) from None
    finally:
        child.kill()
        child.join()
        receiver.close()
    if has_returned:
        return outcome
    raise outcome


def _start(child: multiprocessing.process.BaseProcess) -> None:
    """Start the child with SIGNALS blocked from its first instruction: only this process handles them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        child.start()
        return
    multiprocessing.resource_tracker.ensure_running()  # its own start would unblock them
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, name) for name in SIGNALS])
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run(sender: multiprocessing.connection.Connection, call: Callable[..., object], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows it is not blocked
    threading.Thread(target=end_with_parent, daemon=True).start()
    with safe_output():
        try:
            outcome: tuple[bool, object] = True, call(*arguments)
        except BaseException as error:
            outcome = False, error
    try:
        sender.send(outcome)
    except Exception:  # what cannot be sent raises errors of many types
        sender.send((False, Failed(f"{type(outcome[1]).__name__}: {outcome[1]}")))


def end_with_parent() -> None:
    """End this process when its parent has ended. Run it in a daemon thread."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
