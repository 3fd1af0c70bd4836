"""torchrun that ends as its script ends: `python -m microbert.torchrun --standalone --nproc-per-node=8
mlm_pretrain_v3.py --epochs 3`

It takes torchrun's own arguments, and torchrun does the work. What is added: the constants are checked once, before any
process starts; the exit code is that of the run, as its status.json tells it (torchrun's is 1 whatever happened); a
failure is reported in one line; and on one machine nothing listens on the network.
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
from microbert.runtime.distributed import in_background, loopback_store
from microbert.runtime.files import read_json, write_json
from microbert.runtime.run import (
    BAD_INPUT,
    DONE,
    FAILED,
    LOCK,
    STATUS,
    STOPPED,
    check_folder,
    handled_signals,
    take_lock,
)

ONE_MACHINE, SEVERAL_MACHINES = "microbert-one", "microbert-several"  # names for torchrun's --rdzv-backend
STATIC_PORT = 29500  # torchrun's own default


def main() -> None:
    with safe_output():
        _launch()


def _launch() -> None:
    arguments = get_args_parser().parse_args()
    logging.disable(logging.ERROR)  # torchrun's own account of what its processes tell themselves
    try:
        config = _read_script(Path(arguments.training_script), arguments.training_script_args)
        n_processes = determine_local_world_size(arguments.nproc_per_node)
        if config.device == "cuda" and torch.cuda.device_count() < n_processes:
            raise InputError(
                f"{n_processes} GPUs are asked for, and PyTorch sees {torch.cuda.device_count()} on this machine. Ask for fewer (NUM_GPUS of a "
                "launcher), or train on the CPU (DEVICE=cpu)"
            )
        is_one_machine = parse_min_max_nnodes(arguments.nnodes)[1] == 1
        if arguments.standalone and not is_one_machine:
            raise InputError(
                f"--standalone is for one machine, and --nnodes = {arguments.nnodes}: leave one of them out"
            )
        meeting_place = arguments.rdzv_endpoint.rpartition(":")[0]
        if meeting_place and not is_one_machine:
            _check_host(meeting_place)
            print(f"meeting the other machines at {arguments.rdzv_endpoint} ...", flush=True)
        if not config.dry_run:
            _clear_status(Path(config.output_dir), is_one_machine)
    except (InputError, RuntimeError, ValueError) as error:  # the latter two of torchrun's own arguments
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    _choose_rendezvous(arguments, is_one_machine)
    signals = _handle_signals()
    arguments.signals_to_handle = ",".join(signals)
    exit_code, how_it_ended = _run(arguments)
    for name in signals:  # one more finds nothing left to stop
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise SystemExit(
        exit_code if config.dry_run else _told_end(Path(config.output_dir), arguments.rdzv_id, exit_code, how_it_ended)
    )


def _run(arguments: argparse.Namespace) -> tuple[int, str]:
    """Runs torchrun. Returns the exit code that its end suggests, and a line on what its processes could not tell themselves."""
    try:
        run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how_it_ended = (
            f"process {rank} was ended by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else ""
        )
        return failure.exitcode if failure.exitcode in (BAD_INPUT, STOPPED) else FAILED, how_it_ended
    except SignalException as error:
        return STOPPED, f"stopped by {error.sigval.name}"
    except (RendezvousError, OSError, RuntimeError, ValueError) as error:
        several = (
            " Of several machines one may have left, or not have been reached"
            if arguments.rdzv_backend == SEVERAL_MACHINES
            else ""
        )
        return FAILED, f"torchrun cannot go on ({type(error).__name__}: {error}).{several}"
    return DONE, ""


class _OneMachine(RendezvousHandler):
    """The meeting of the one torchrun of a launch with itself.

    torchrun's own listens on all interfaces, on one machine too, and unpickles what comes in. This one listens on the
    loopback interface alone, and nothing is unpickled.
    """

    use_agent_store = True

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id, self._store, self._n_attempts = parameters.run_id, loopback_store(wait_for_workers=False), 0

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
        """Nobody else comes."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def _choose_rendezvous(arguments: argparse.Namespace, is_one_machine: bool) -> None:
    """Make torchrun meet as above on one machine, and elsewhere in a way that signals interrupt: it waits for the
    other machines in C++."""
    backend, node_rank = arguments.rdzv_backend, arguments.node_rank

    def several_machines(parameters: RendezvousParameters) -> RendezvousHandler:
        parameters.backend = backend
        parameters.config.setdefault("rank", node_rank)  # as torchrun does for the backend "static"
        handler = in_background(lambda: rendezvous_handler_registry.create_handler(parameters), lambda: None)
        handler.next_rendezvous = functools.partial(in_background, handler.next_rendezvous, lambda: None)
        return handler

    if is_one_machine:
        rendezvous_handler_registry.register(ONE_MACHINE, _OneMachine)
        arguments.standalone, arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_id = (
            False,
            ONE_MACHINE,
            "localhost",
            str(uuid.uuid4()),
        )
    else:
        rendezvous_handler_registry.register(SEVERAL_MACHINES, several_machines)
        if arguments.master_port is None:
            arguments.master_port = STATIC_PORT
        arguments.rdzv_endpoint = get_rdzv_endpoint(arguments)  # of "static" the master's
        arguments.rdzv_backend = SEVERAL_MACHINES


def _handle_signals() -> list[str]:
    """Makes an exception of each signal that is to stop a run, as torchrun does once its processes have started. Returns their names."""

    def stop(number: int, _: object) -> None:
        raise SignalException(f"signal {number}", signal.Signals(number))

    names = handled_signals()
    for name in names:
        signal.signal(getattr(signal, name), stop)
    return names


def _read_script(script: Path, flags: list[str]) -> Config:
    if not script.is_file():
        raise InputError(f"there is no script {script}")
    return read_script(script, flags)


def _check_host(name: str) -> None:
    try:
        socket.getaddrinfo(name.strip("[]"), None)  # an IPv6 address stands in brackets
    except OSError:
        raise InputError(f"no machine is known here as {name!r} (HEAD_NODE of a launcher)") from None


def _clear_status(folder: Path, is_one_machine: bool) -> None:
    """Removes the status.json of an earlier launch. Raises InputError where a run holds the folder, unless that may be this one on another machine."""
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


def _told_end(folder: Path, launch: str, exit_code: int, how_it_ended: str) -> int:
    """The exit code that status.json tells of this launch, else the one given. Tells what nobody was left to tell, and completes status.json."""
    status = {}
    with contextlib.suppress(OSError, ValueError):
        stored = read_json(folder / STATUS)
        status = stored if stored.get("launch") == launch else {}
    if exit_code == DONE:  # of several machines' folders, one alone says so
        return DONE
    if isinstance(status.get("exit_code"), int):
        exit_code = status["exit_code"]
        if status.get("host") != socket.gethostname():
            how_it_ended = f"on {status['host']}: process {status['rank']}: {status['reason']}"
    elif status:  # the process that writes it was killed
        exit_code, how_it_ended = FAILED, how_it_ended or "a process ended without a word"
        with contextlib.suppress(OSError):
            write_json(folder / STATUS, status | {"state": "failed", "exit_code": FAILED, "reason": how_it_ended})
    elif exit_code == STOPPED and how_it_ended:
        how_it_ended += " before the run began"
    if exit_code == FAILED and how_it_ended or exit_code == STOPPED and not status:
        print(f"error: {how_it_ended}" if exit_code == FAILED else how_it_ended, file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    main()
