"""The processes of a run, as torchrun starts them.

Environment variables give a process its rank, the number of processes, and the address of the store. While tokens are
prepared, which may take hours, the processes communicate through the store alone. For training they form a group,
whose collective operations are fast and have a time limit. A single process needs neither.
"""

import contextlib
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Self, TypeVar

import torch
import torch.distributed as dist

from microbert.errors import InputError
from microbert.runtime.collectives import Collectives
from microbert.runtime.stopping import Stopping
from microbert.runtime.store import ANSWER_SECONDS, Store, connect, is_loopback, join_attempt, open_attempt
from microbert.runtime.waiting import in_background, never_stop

MEETING_SECONDS = 300.0  # for all processes to find the store and each other; torchrun starts them at the same time
LOOPBACK_NAMES = ("lo", "lo0")  # network interfaces of Linux and macOS

T = TypeVar("T")


class World(Collectives):
    """This process among all those of the run.

    rank: 0 to size - 1. local_rank, local_size: the same on this machine. launch: torchrun's id of this launch, ""
    without torchrun. is_restart: on rank 0, whether torchrun or Slurm has restarted the run.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        """environment: os.environ when None."""
        variables = os.environ if environment is None else environment
        super().__init__(int(variables.get("RANK", "0")), int(variables.get("WORLD_SIZE", "1")))
        self.local_rank, self.local_size = (
            int(variables.get("LOCAL_RANK", "0")),
            int(variables.get("LOCAL_WORLD_SIZE", "1")),
        )
        self.is_restart = any(
            variables.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
        )
        self.launch = variables.get("TORCHELASTIC_RUN_ID", "")
        self.has_one_thread = variables.get("OMP_NUM_THREADS") == "1"
        self.parent = os.getppid()  # read at once: it changes when the parent ends
        self.stopping = Stopping(self.rank, self.size)
        self._store: Store | None = None
        self._give_up: Callable[[], None] = never_stop

    @classmethod
    def alone(cls) -> Self:
        """Return the world of a single process, whatever the environment."""
        return cls({})

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the run's folder and prints."""
        return self.rank == 0

    def meet(self, check_stop: Callable[[], None] = never_stop, give_up: Callable[[], None] = never_stop) -> None:
        """Find the store, and all processes in it.

        give_up: called when other processes take long to answer. An exception from it ends the wait.
        Raises InputError where the environment does not name the store, and DistError after MEETING_SECONDS. Where an
        earlier attempt of the launch has ended for good, exit with its code: torchrun restarts after any failure.
        """
        if self.size == 1 and not self.launch:
            return
        self._give_up = give_up
        host, port = _store_address(self.size)
        is_server = self.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        deadline = time.monotonic() + MEETING_SECONDS

        def check() -> None:
            check_stop()
            if time.monotonic() > deadline:
                is_connected = self.stopping.launch_store is not None
                problem = (
                    f"not all of {self.size} processes arrived"
                    if is_connected
                    else f"no store answered at {host}:{port}"
                )
                raise dist.DistError(f"{problem} within {MEETING_SECONDS:.0f} seconds")

        store = Store(in_background(lambda: connect(host, port, is_server), check), give_up).with_prefix("microbert")
        self.stopping.launch_store = store
        try:
            self._store = self.stopping.store = self._find_all(store, check)
        except dist.DistError:
            check_stop()  # if all were asked to stop, the process that runs the store may have left first
            raise

    def _find_all(self, store: Store, check: Callable[[], None]) -> Store:
        if store.check("final exit code"):
            raise SystemExit(int(store.get("final exit code")))
        name = uuid.uuid4().hex
        if not self.is_first:
            return join_attempt(store, name, self.rank, check)
        # torchrun's count of restarts stays 0 on a machine where nothing failed
        self.is_restart = store.add("attempts", 1) > 1 or self.is_restart
        return open_attempt(store, name, self.size, check)

    def on_rank_0(self, name: str, work: Callable[[], T], check_stop: Callable[[], None] = never_stop) -> T:
        """Run `work` on rank 0 and return its JSON-serialisable result on every rank. Use each `name` only once."""
        if self._store is None:
            return work()
        if self.is_first:
            value = work()
            self._store.set(name, json.dumps(value))
            return value
        return json.loads(self._store.wait_for(name, check_stop))

    @contextlib.contextmanager
    def local_rank_0_first(self, name: str, check_stop: Callable[[], None] = never_stop) -> Iterator[None]:
        """Run the block on one process of each machine, then on the others, which find its files in the caches."""
        if self._store is None:
            yield
            return
        key = f"{name}/{self.rank - self.local_rank}"
        if self.local_rank:
            self._store.wait_for(key, check_stop)
        yield
        if not self.local_rank:
            self._store.set(key, "done")

    def form_group(
        self, device: torch.device, timeout_seconds: float, check_stop: Callable[[], None] = never_stop
    ) -> None:
        """Wait for all processes without a limit, then form a group: gloo, and nccl for tensors on CUDA.

        From here on, a request to stop is passed on by `gather`. timeout_seconds: for each collective operation.
        """
        if self.size == 1:
            return
        if self._store is None:
            raise RuntimeError("call meet() before form_group()")
        self.stopping.wait_for_all_to_train(check_stop)
        if self.local_size == self.size or is_loopback(os.environ.get("MASTER_ADDR", "")):
            _restrict_gloo_to_loopback()
        store, begun = self._store, time.monotonic()

        def check() -> None:
            check_stop()
            if time.monotonic() > begun + ANSWER_SECONDS:
                self._give_up()

        in_background(lambda: self._init_group(store.new_connection(), device, timeout_seconds), check)


def _store_address(n_processes: int) -> tuple[str, int]:
    """Return the host and port of the store. Raises InputError where the environment does not give them."""
    host, port = os.environ.get("MASTER_ADDR", "").strip("[]"), os.environ.get("MASTER_PORT", "")
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)):
        if not value:
            raise InputError(f"WORLD_SIZE = {n_processes}, but {name} is not set: start the processes with torchrun")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"MASTER_PORT = {port!r} is not a port: start the processes with torchrun")
    return host, int(port)


def _restrict_gloo_to_loopback() -> None:
    """Let gloo listen on the loopback interface only, unless GLOO_SOCKET_IFNAME names another."""
    names = [name for _, name in socket.if_nameindex()] if sys.platform != "win32" else []
    if name := next(filter(names.__contains__, LOOPBACK_NAMES), None):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def lost_process(error: BaseException) -> str:
    """Return one line if the error is PyTorch's for another process that ended or hangs, else ""."""
    is_lost = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
    )
    return f"another process ended, or does not answer ({str(error).strip().splitlines()[0][:200]})" if is_lost else ""
