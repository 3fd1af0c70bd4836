"""Start, watch, find and end launches of several processes by torchrun, on a small corpus."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
from helpers import ROOT, TIME_LIMIT, end_tree, patched_script, small_flags, wait_for_checkpoint

SCRIPT = ROOT / "mlm_pretrain_v3.py"
# torchrun, or a module around it, which kills its processes that many seconds after the signal to end, instead of 30
WITH_PATIENCE = """import os, runpy, sys
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext
seconds, module = int(sys.argv.pop(1)), sys.argv.pop(1)
os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(seconds)
for end in (LocalElasticAgent._shutdown, PContext.close):
    end.__defaults__ = (end.__defaults__[0], seconds)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
FOREVER = 10 * TIME_LIMIT  # as `patience`: only a process that hangs is killed


def flags_of(folder: Path, n_processes: int, **constants: object) -> list[str]:
    """Return the flags of a run with eight sequences per step, on any number of processes."""
    shape = {
        "n_layers": 2,
        "n_heads": 2,
        "n_embed": 4,
        "packing": False,
        "batch_size": 8 // n_processes,
        "device": "cpu",
    }
    return small_flags(folder, **{**shape, **constants})


def torchrun_command(
    flags: list[str],
    n_processes: int,
    *options: str,
    script: Path = SCRIPT,
    module: str = "microbert.torchrun",
    patience: int | None = None,
) -> list[str]:
    program = ("-m", module) if patience is None else ("-c", WITH_PATIENCE, str(patience), module)
    where = () if any(option.startswith("--nnodes") for option in options) else ("--standalone",)
    return [sys.executable, *program, *where, f"--nproc-per-node={n_processes}", *options, str(script), *flags]


def start(flags: list[str], n_processes: int = 2, *options: str, **keywords: object) -> subprocess.Popen:
    command = torchrun_command(flags, n_processes, *options, **keywords)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process: subprocess.Popen, limit: float = TIME_LIMIT) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr. Kill a launch that does not end in time, and fail the test."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        end_tree(process)
        out, err = process.communicate()
        raise AssertionError(f"no end after {limit} s:\n{out}\n{err}") from None
    return process.returncode, out, err


def launch(flags: list[str], n_processes: int = 2, *options: str, **keywords: object) -> tuple[int, str, str]:
    return finish(start(flags, n_processes, *options, **keywords))


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ranks(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """Return the processes of a launch that have started, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children():
        try:
            environment = child.environ()
        except psutil.Error:
            continue
        if "LOCAL_RANK" in environment:
            found[int(environment["RANK"])] = child
    return found


def wait_for_training(process: subprocess.Popen, folder: Path) -> dict[int, psutil.Process]:
    """Wait for the first checkpoint. Return the processes by rank."""
    wait_for_checkpoint(process, folder)
    return ranks(process)


def all_gone(processes: list[psutil.Process], within: float) -> bool:
    gone, alive = psutil.wait_procs(processes, timeout=within)
    for process in alive:
        process.kill()
    return not alive


def status(folder: Path) -> dict:
    """Return the contents of status.json, or an empty dict if there is none."""
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def faulty_script(path: Path, patch: str, script: Path = SCRIPT) -> Path:
    """Write a script that runs some lines of Python, in which `rank` is defined, and then v3."""
    return patched_script(path, f'rank = int(os.environ["RANK"])\n{patch}', script)
