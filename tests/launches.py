"""Launches of several processes, as torchrun makes them, on a small corpus: how to start, watch, find and end them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from helpers import ROOT, small_flags

SCRIPT = ROOT / "mlm_pretrain_v3.py"
LIMIT = 150  # seconds for a launch: a hang is a failure
# each test's processes on cores of their own would be faster; on two cores more threads than these only wait for each other
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def flags_of(folder: Path, n_processes: int, **constants: object) -> list[str]:
    """A run of eight sequences a step, on any number of processes."""
    shape = {"n_layers": 2, "n_heads": 2, "n_embed": 4, "packing": False, "batch_size": 8 // n_processes, "device": "cpu"}
    return small_flags(folder, **{**shape, **constants})


def torchrun_command(flags: list[str], n_processes: int, *options: str, script: Path = SCRIPT, module: str = "microbert.torchrun") -> list[str]:
    where = () if any(option.startswith("--nnodes") for option in options) else ("--standalone",)
    return [sys.executable, "-m", module, *where, f"--nproc-per-node={n_processes}", *options, str(script), *flags]


def start(flags: list[str], n_processes: int = 2, *options: str, **keywords: object) -> subprocess.Popen:
    command = torchrun_command(flags, n_processes, *options, **keywords)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)


def finish(process: subprocess.Popen, limit: float = LIMIT) -> tuple[int, str, str]:
    """Exit code, output and errors. A launch that does not end in time is ended, with its processes, and fails the test."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        end_tree(process)
        out, err = process.communicate()
        raise AssertionError(f"no end after {limit} s:\n{out}\n{err}") from None
    return process.returncode, out, err


def launch(flags: list[str], n_processes: int = 2, *options: str, **keywords: object) -> tuple[int, str, str]:
    return finish(start(flags, n_processes, *options, **keywords))


def end_tree(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                pass


def free_port() -> int:
    """A port of this machine that nobody has taken a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ranks(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The launch's processes by rank, as far as they have started."""
    found = {}
    for child in psutil.Process(process.pid).children():
        try:
            environment = child.environ()
        except psutil.Error:
            continue
        if "LOCAL_RANK" in environment:
            found[int(environment["RANK"])] = child
    return found


def wait_until(condition, process: subprocess.Popen, limit: float = LIMIT) -> None:
    """Polls until the condition holds, and fails where the launch ends, or the limit is reached, before it does."""
    deadline = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > deadline:
            end_tree(process)
            raise AssertionError(f"not so after {limit} s: {process.communicate()}")
        time.sleep(0.01)


def wait_for_training(process: subprocess.Popen, folder: Path) -> dict[int, psutil.Process]:
    """Waits for the first checkpoint; returns the processes by rank."""
    wait_until(lambda: any(folder.glob("checkpoint-*")), process)
    return ranks(process)


def all_gone(processes: list[psutil.Process], within: float) -> bool:
    gone, alive = psutil.wait_procs(processes, timeout=within)
    for process in alive:
        process.kill()
    return not alive


def status(folder: Path) -> dict:
    """What status.json holds, nothing where there is none."""
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def faulty_script(path: Path, patch: str, script: Path = SCRIPT) -> Path:
    """A script that runs v3 after some lines of Python, in which `rank` is the process's."""
    path.write_text(f"""import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
rank = int(os.environ["RANK"])
{patch}
runpy.run_path({str(script)!r}, run_name="__main__")
""")
    return path
