"""A call in a child process: its result, its errors, and its end."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, TIME_LIMIT, wait_until

from microbert.errors import Failed, InputError, Stopped
from microbert.runtime.child_process import call_in_child

PROGRAM = """import concurrent.futures, os, pathlib, sys, threading
from microbert.runtime.child_process import call_in_child

def work(path):  # as `datasets` downloads: in a pool of threads, which Python joins at exit
    pathlib.Path(f"{path}.tmp").write_text(str(os.getpid()))
    os.replace(f"{path}.tmp", path)  # so that the file is never seen empty
    concurrent.futures.ThreadPoolExecutor(1).submit(threading.Event().wait).result()

def check_stop():
    if stops and os.path.exists(sys.argv[1]):
        raise InterruptedError

if __name__ == "__main__":
    stops = sys.argv[2] == "stops"
    try:
        call_in_child(work, sys.argv[1], check_stop=check_stop)
    except InterruptedError:
        print("stopped")
"""


def divide(a, b):
    return a / b


def refuse(message):
    raise InputError(message)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def make_a_function():
    return lambda: None


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def launch(tmp_path, how):
    """Start PROGRAM and return it; its child writes its process id to the file "pid"."""
    (tmp_path / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path / "pid", how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_result_and_the_error_of_a_call_are_returned():
    assert call_in_child(divide, 6, 3) == 2
    with pytest.raises(ZeroDivisionError):
        call_in_child(divide, 1, 0)
    with pytest.raises(InputError, match="^no such dataset$"):
        call_in_child(refuse, "no such dataset")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to kill with")
def test_a_child_that_is_killed_or_ends_early_is_an_error():
    with pytest.raises(Failed, match="was killed"):
        call_in_child(kill_itself)
    with pytest.raises(Failed, match="ended before its work"):
        call_in_child(os._exit, 9)


def test_a_result_that_cannot_be_sent_is_an_error():
    with pytest.raises(Failed, match="function"):
        call_in_child(make_a_function)


def test_a_stop_ends_a_call_that_hangs():
    def check_stop():
        raise Stopped("now")

    with pytest.raises(Stopped):
        call_in_child(time.sleep, TIME_LIMIT, check_stop=check_stop)


def test_threads_of_the_child_do_not_delay_the_exit(tmp_path):
    process = launch(tmp_path, "stops")
    output, errors = process.communicate(timeout=TIME_LIMIT)
    assert (process.returncode, output, errors) == (0, "stopped\n", "")
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_the_child_leaves_signals_to_its_parent_and_dies_with_it(tmp_path):
    process = launch(tmp_path, "hangs")
    wait_until((tmp_path / "pid").exists, process)
    child = int((tmp_path / "pid").read_text())
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child, name)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.kill()
    assert process.communicate(timeout=TIME_LIMIT) == ("", "")  # the child held the other end of both pipes
