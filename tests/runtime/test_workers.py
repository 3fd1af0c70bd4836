"""The processes of the pool: stopped, killed, orphaned."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import ROOT, TIME_LIMIT

from microbert.errors import Failed
from microbert.runtime import workers
from microbert.runtime.workers import WORTH_MEGABYTES, open_pool

MUCH = 2 * WORTH_MEGABYTES
began_with = None


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(workers, "n_cores", lambda: 2)


def begin(value):
    global began_with
    began_with = value


def process_and_value(*_):
    return os.getpid(), began_with


def test_little_work_stays_in_this_process_and_much_goes_to_others():
    for megabytes, is_here in ((1, True), (MUCH, False)):
        with open_pool(megabytes, begin, "a value") as pool:
            process, value = pool.submit(process_and_value).result(TIME_LIMIT)
        assert (process == os.getpid(), value) == (is_here, "a value")


def test_one_core_starts_no_process(monkeypatch):
    monkeypatch.setattr(workers, "n_cores", lambda: 1)
    with open_pool(MUCH, begin, 1) as pool:
        assert pool.submit(process_and_value).result(TIME_LIMIT)[0] == os.getpid()


def test_a_killed_process_ends_the_work_with_a_plain_message():
    with pytest.raises(Failed, match="killed"), open_pool(MUCH, begin, 1) as pool:
        process, _ = pool.submit(process_and_value).result(TIME_LIMIT)
        tasks = [pool.submit(process_and_value, ["x" * 1000] * 4000) for _ in range(20)]
        os.kill(process, signal.SIGKILL)
        for task in tasks:
            task.result(TIME_LIMIT)
        time.sleep(60)  # not reached


def test_workers_ignore_signals():
    with open_pool(MUCH, begin, 1) as pool:
        process, _ = pool.submit(process_and_value).result(TIME_LIMIT)
        for name in (signal.SIGINT, signal.SIGTERM):
            os.kill(process, name)
        assert pool.submit(process_and_value).result(TIME_LIMIT)[1] == 1


def test_tasks_that_have_not_started_are_cancelled_by_an_error():
    with pytest.raises(ValueError), open_pool(MUCH, begin, 1) as pool:
        tasks = [pool.submit(time.sleep, 1) for _ in range(100)]
        raise ValueError
    assert sum(task.cancelled() for task in tasks) > 90


@pytest.mark.slow
def test_no_process_outlives_a_killed_run(tmp_path):
    program = f"""
import time
from microbert.runtime import workers
workers.n_cores = lambda: 2
if __name__ == "__main__":
    with workers.open_pool({MUCH}, print, "begun") as pool:
        tasks = [pool.submit(time.sleep, 1000) for _ in range(2)]
        time.sleep(1000)
"""
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    for _ in range(2):
        process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=TIME_LIMIT)
    assert not alive
