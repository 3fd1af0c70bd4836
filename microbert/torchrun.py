"""torchrun that ends as its script ends: `python -m microbert.torchrun --standalone --nproc-per-node=8 mlm_pretrain_v3.py --epochs 3`

It takes torchrun's own arguments, and torchrun does the work. What is added: the constants are checked once, before any process starts; the exit
code is that of the run, as its status.json tells it (torchrun's is 1 whatever happened); and a failure is told in one line.
"""

import contextlib
import logging
import runpy
import signal
import socket
import sys
from pathlib import Path

import filelock
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import determine_local_world_size, get_args_parser, parse_min_max_nnodes, run

from .config import Config, InputError, read_config
from .files import read_json, write_json
from .run import BAD_INPUT, DONE, FAILED, LOCK, STATUS, STOPPED, take_lock


def main() -> None:
    arguments = get_args_parser().parse_args()
    logging.disable(logging.ERROR)  # torchrun's own account of what its processes tell themselves
    try:
        config = _read_script(Path(arguments.training_script), arguments.training_script_args)
        n_processes = determine_local_world_size(arguments.nproc_per_node)
        if config.device == "cuda" and torch.cuda.device_count() < n_processes:
            raise InputError(f"{n_processes} GPUs are asked for, and PyTorch sees {torch.cuda.device_count()} on this machine. Ask for fewer (NUM_GPUS of a "
                             "launcher), or train on the CPU (DEVICE=cpu)")
        meeting_place = arguments.rdzv_endpoint.rpartition(":")[0]
        if meeting_place:
            _check_host(meeting_place)
            print(f"meeting the other machines at {arguments.rdzv_endpoint} ...", flush=True)
        if not config.dry_run:
            _clear_status(Path(config.output_dir), is_one_machine=parse_min_max_nnodes(arguments.nnodes)[1] == 1)
    except (InputError, ValueError) as error:  # the latter of torchrun's own arguments
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    how_it_ended, exit_code = "", DONE
    try:
        run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        exit_code = FAILED
        if failure.exitcode < 0:
            how_it_ended = f"process {rank} was ended by {signal.Signals(-failure.exitcode).name}"
    except SignalException as error:
        how_it_ended, exit_code = f"stopped by {error.sigval.name} before the run began", STOPPED
    except (OSError, RuntimeError, ValueError) as error:  # of the rendezvous
        how_it_ended, exit_code = f"the machines do not find each other ({type(error).__name__}: {error})", FAILED
    raise SystemExit(exit_code if config.dry_run else _told_end(Path(config.output_dir), arguments.rdzv_id, how_it_ended, exit_code))


def _read_script(script: Path, flags: list[str]) -> Config:
    if not script.is_file():
        raise InputError(f"there is no script {script}")
    constants = {name: value for name, value in runpy.run_path(str(script)).items() if not name.startswith("__")}
    return read_config(str(script), constants, flags)


def _check_host(name: str) -> None:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        raise InputError(f"no machine is known here as {name!r} (HEAD_NODE of a launcher)") from None


def _clear_status(folder: Path, is_one_machine: bool) -> None:
    """Removes the status.json of an earlier launch. Raises InputError where a run holds the folder, which on several machines may be this one."""
    if not folder.exists():
        return
    lock = filelock.FileLock(folder / LOCK)
    try:
        take_lock(folder, lock)
        (folder / STATUS).unlink(missing_ok=True)
    except InputError:
        if is_one_machine:
            raise
    finally:
        lock.release()


def _told_end(folder: Path, launch: str, how_it_ended: str, exit_code: int) -> int:
    """The exit code that status.json tells of this launch, else the one given. Completes a status.json that nobody was left to write."""
    status = {}
    with contextlib.suppress(OSError, ValueError):
        status = read_json(folder / STATUS)
    if status.get("launch") == launch and isinstance(status.get("exit_code"), int):
        exit_code = status["exit_code"]
    elif status.get("launch") == launch and exit_code:
        exit_code = FAILED
        with contextlib.suppress(OSError):
            write_json(folder / STATUS, status | {"state": "failed", "exit_code": FAILED, "reason": how_it_ended or "a process ended without a word"})
    if how_it_ended and exit_code not in (DONE, BAD_INPUT) and not (exit_code == STOPPED and status):
        print(f"error: {how_it_ended}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    main()
