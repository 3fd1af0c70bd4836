"""torchrun, with the exit code of its script: `python -m microbert.torchrun --standalone --nproc-per-node=8
mlm_pretrain_v3.py --epochs 3`

It has torchrun's arguments, and torchrun does the work. In addition, it checks the constants once, before any process
starts; exits with the code of the run, as status.json gives it (torchrun exits with 1 for any failure); reports a
failure in one line; and on one machine listens on the loopback interface only.
"""

import argparse
import contextlib
import functools
import logging
import signal
import socket
import sys
import uuid
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import (
    determine_local_world_size,
    get_args_parser,
    get_rdzv_endpoint,
    parse_min_max_nnodes,
    run,
)

from microbert.config.constants import Config
from microbert.config.flags import read_script
from microbert.config.terminal import safe_output
from microbert.errors import InputError
from microbert.runtime.files import read_json, write_json
from microbert.runtime.outcome import BAD_INPUT, DONE, FAILED, STOPPED
from microbert.runtime.run_folder import LOCK, STATUS, check_folder, take_lock
from microbert.runtime.signals import handled_signals
from microbert.runtime.store import loopback_store
from microbert.runtime.waiting import in_background

ONE_MACHINE, SEVERAL_MACHINES = "microbert-one", "microbert-several"  # values for torchrun's --rdzv-backend
STATIC_PORT = 29500  # torchrun's default


def main() -> None:
    with safe_output():
        _launch()


def _launch() -> None:
    arguments = get_args_parser().parse_args()
    logging.disable(logging.ERROR)  # torchrun logs errors that the run itself reports
    try:
        config = _read_script(Path(arguments.training_script), arguments.training_script_args)
        is_one_machine = _check_machines(arguments, config)
        if not config.dry_run:
            _clear_status(Path(config.output_dir), is_one_machine)
    except (InputError, RuntimeError, ValueError) as error:  # the latter two from torchrun's own arguments
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    _choose_rendezvous(arguments, is_one_machine)
    signals = _handle_signals()
    arguments.signals_to_handle = ",".join(signals)
    exit_code, reason = _run(arguments)
    for name in signals:  # everything has ended: a further signal must not change the exit code
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not config.dry_run:
        exit_code = _report_end(Path(config.output_dir), arguments.rdzv_id, exit_code, reason)
    raise SystemExit(exit_code)


def _read_script(script: Path, flags: list[str]) -> Config:
    if not script.is_file():
        raise InputError(f"the script {script} does not exist")
    return read_script(script, flags)


def _check_machines(arguments: argparse.Namespace, config: Config) -> bool:
    """Check the number of GPUs and the address of the other machines. Return whether there is only one machine."""
    n_processes = determine_local_world_size(arguments.nproc_per_node)
    if config.device == "cuda" and (n_gpus := torch.cuda.device_count()) < n_processes:
        raise InputError(
            f"the number of GPUs requested is {n_processes}, but PyTorch finds {n_gpus} on this machine. Request fewer "
            "(NUM_GPUS of a launcher), or train on the CPU (DEVICE=cpu)"
        )
    is_one_machine = parse_min_max_nnodes(arguments.nnodes)[1] == 1
    if arguments.standalone and not is_one_machine:
        raise InputError(f"--standalone is for one machine, but --nnodes = {arguments.nnodes}: remove one of them")
    host = arguments.rdzv_endpoint.rpartition(":")[0]
    if host and not is_one_machine:
        try:
            socket.getaddrinfo(host.strip("[]"), None)  # an IPv6 address is in brackets
        except OSError:
            raise InputError(f"the host name {host!r} is unknown here (HEAD_NODE of a launcher)") from None
        print(f"connecting to the other machines at {arguments.rdzv_endpoint} ...", flush=True)
    return is_one_machine


def _run(arguments: argparse.Namespace) -> tuple[int, str]:
    """Run torchrun. Return the exit code that its end implies, and the reason unless the processes reported it."""
    try:
        run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        reason = (
            f"process {rank} was killed by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else ""
        )
        return failure.exitcode if failure.exitcode in (BAD_INPUT, STOPPED) else FAILED, reason
    except SignalException as error:
        return STOPPED, f"stopped by {error.sigval.name}"
    except (RendezvousError, OSError, RuntimeError, ValueError) as error:
        hint = ""
        if arguments.rdzv_backend == SEVERAL_MACHINES:
            hint = ". Another machine may have left, or may be unreachable"
        return FAILED, f"torchrun failed ({type(error).__name__}: {error}){hint}"
    return DONE, ""


class _OneMachine(RendezvousHandler):
    """The rendezvous of the only torchrun of a launch.

    torchrun's own listens on all network interfaces, on one machine too, and unpickles what it receives. This one
    listens on the loopback interface only, and unpickles nothing.
    """

    use_agent_store = True

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id, self._store, self._n_attempts = parameters.run_id, loopback_store(), 0

    def get_backend(self) -> str:
        return ONE_MACHINE

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        self._n_attempts += 1
        store = dist.PrefixStore(f"torchrun/{self._n_attempts}", self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(self._store.host, self._store.port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: no other torchrun joins."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def _choose_rendezvous(arguments: argparse.Namespace, is_one_machine: bool) -> None:
    """Let torchrun use _OneMachine on one machine, and on several its own rendezvous, made interruptible by signals.

    Its own waits for the other machines in C++, so that it runs in the background.
    """
    backend, node_rank = arguments.rdzv_backend, arguments.node_rank

    def several_machines(parameters: RendezvousParameters) -> RendezvousHandler:
        parameters.backend = backend
        parameters.config.setdefault("rank", node_rank)  # as torchrun does for the backend "static"
        handler = in_background(lambda: rendezvous_handler_registry.create_handler(parameters))
        wait = functools.partial(in_background, handler.next_rendezvous)
        handler.next_rendezvous = wait  # type: ignore[method-assign]  # on this handler only
        return handler

    if is_one_machine:
        rendezvous_handler_registry.register(ONE_MACHINE, _OneMachine)
        arguments.standalone, arguments.rdzv_backend = False, ONE_MACHINE
        arguments.rdzv_endpoint, arguments.rdzv_id = "localhost", str(uuid.uuid4())
    else:
        rendezvous_handler_registry.register(SEVERAL_MACHINES, several_machines)
        if arguments.master_port is None:
            arguments.master_port = STATIC_PORT
        arguments.rdzv_endpoint = get_rdzv_endpoint(arguments)  # the master's address for the backend "static"
        arguments.rdzv_backend = SEVERAL_MACHINES


def _handle_signals() -> list[str]:
    """Raise SignalException for each stop signal, as torchrun does once its processes run. Return their names."""

    def stop(number: int, _: object) -> None:
        raise SignalException(f"signal {number}", signal.Signals(number))

    names = handled_signals()
    for name in names:
        signal.signal(getattr(signal, name), stop)
    return names


def _clear_status(folder: Path, is_one_machine: bool) -> None:
    """Remove the status.json of an earlier launch.

    Raises InputError if another run uses the folder. With several machines, that may be this run on another machine.
    """
    check_folder(folder)
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


def _report_end(folder: Path, launch: str, exit_code: int, reason: str) -> int:
    """Return the exit code that status.json gives for this launch, or else `exit_code`.

    Print a reason that no process of the run could print, and complete status.json.
    """
    status = {}
    with contextlib.suppress(OSError, ValueError):
        stored = read_json(folder / STATUS)
        status = stored if stored.get("launch") == launch else {}
    if exit_code == DONE:  # of the machines' folders, only rank 0's says so
        return DONE
    if isinstance(status.get("exit_code"), int):
        exit_code = status["exit_code"]
        if status.get("host") != socket.gethostname():
            reason = f"on {status['host']}: process {status['rank']}: {status['reason']}"
    elif status:  # the process that writes it was killed
        exit_code, reason = FAILED, reason or "a process ended without an error message"
        with contextlib.suppress(OSError):
            write_json(folder / STATUS, status | {"state": "failed", "exit_code": FAILED, "reason": reason})
    elif exit_code == STOPPED and reason:
        reason += " before the run began"
    if (exit_code == FAILED and reason) or (exit_code == STOPPED and not status):
        print(f"error: {reason}" if exit_code == FAILED else reason, file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    main()
