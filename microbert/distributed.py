"""The processes of a run, as torchrun starts them.

Environment variables tell a process which of how many it is, and where all meet: at a store of short texts under keys. While tokens are
prepared, which may take hours, the processes speak through the store alone, because waiting there has no end and can be interrupted. For
training they form a group, whose collectives are fast and have a time limit. A process that is alone needs neither.
Shapes: W processes.
"""

import contextlib
import datetime
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterator
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from .config import InputError

POLL_SECONDS = 0.05
MEETING_SECONDS = 300.0  # for the processes of all machines to find the store, and each other there; torchrun starts them at the same time
STOP_SECONDS = 20.0  # for every process to notice that one was told to stop: torchrun kills after 30
ORPHAN_SECONDS = 8.0  # for a process to save and leave, once torchrun itself was killed
STOP, GO = "stop", "go"

T = TypeVar("T")


class World:
    """This process among all those of the run.

    rank: of 0 to size - 1. local_rank: the same on this machine. launch: torchrun's id of this launch, "" without torchrun. is_restart: True,
    in the first process, when torchrun or Slurm has started the run again.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        """environment: os.environ when None."""
        variables = os.environ if environment is None else environment
        self.rank, self.local_rank = int(variables.get("RANK", "0")), int(variables.get("LOCAL_RANK", "0"))
        self.size, self.local_size = int(variables.get("WORLD_SIZE", "1")), int(variables.get("LOCAL_WORLD_SIZE", "1"))
        self.is_restart = any(variables.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
        self.launch = variables.get("TORCHELASTIC_RUN_ID", "")
        self.one_thread_asked = variables.get("OMP_NUM_THREADS") == "1"
        self._parent = os.getppid()
        self._store: dist.Store | None = None  # of this attempt
        self._launch_store: dist.Store | None = None  # of all attempts

    @property
    def is_first(self) -> bool:
        """True in the process that writes the run's folder and prints."""
        return self.rank == 0

    def meet(self, check_stop: Callable[[], None]) -> None:
        """Finds the store, and all processes in it. Raises InputError where nothing says where it is.

        torchrun keeps one store for all attempts of a launch, so each attempt speaks under a prefix of its own, which the first process gives
        to those that say hello. What an earlier attempt has said is answered too, and nobody is left to hear it. Where such a one ended for
        good, so does this process, with its exit code: torchrun starts its processes again whatever that was.
        """
        if self.size == 1 and not self.launch:
            return
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=MEETING_SECONDS)))
        except ValueError as error:
            raise InputError(f"WORLD_SIZE = {self.size}, but {_one_line(error)}: start several processes with torchrun") from error
        deadline = time.monotonic() + MEETING_SECONDS

        def check() -> None:
            check_stop()
            if time.monotonic() > deadline:
                raise dist.DistError(f"not all of {self.size} processes came within {MEETING_SECONDS:.0f} seconds")

        store, mine = dist.PrefixStore("microbert", store), uuid.uuid4().hex
        if store.check(["ended for good"]):
            raise SystemExit(int(store.get("ended for good")))
        if self.is_first:
            # torchrun's count of restarts stays 0 on a machine where nothing failed
            self.is_restart = store.add("attempts", 1) > 1 or self.is_restart
            attempt = dist.PrefixStore(mine, store)
            while attempt.add("arrived", 0) < self.size - 1:
                for hello in (f"hello/{rank}" for rank in range(1, self.size)):
                    if store.check([hello]):
                        store.set(f"welcome/{store.get(hello).decode()}", mine)
                check()
                time.sleep(POLL_SECONDS)
        else:
            store.set(f"hello/{self.rank}", mine)
            _wait_for(store, f"welcome/{mine}", check)
            attempt = dist.PrefixStore(store.get(f"welcome/{mine}").decode(), store)
            attempt.add("arrived", 1)
        self._store, self._launch_store = attempt, store

    def watch_parent(self, on_loss: Callable[[], None]) -> None:
        """Calls `on_loss` when torchrun is gone, however it ended, and ends this process ORPHAN_SECONDS later at the latest."""
        if self.launch:
            threading.Thread(target=self._watch_parent, args=(on_loss,), daemon=True).start()

    def _watch_parent(self, on_loss: Callable[[], None]) -> None:
        while os.getppid() == self._parent:
            time.sleep(0.5)
        on_loss()
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    def first_end(self, story: dict[str, object], for_good: Container[object]) -> tuple[dict[str, object], bool]:
        """How this launch ended: this process's story, unless another one's came first; and whether it is this process's.

        for_good: the exit codes after which torchrun need not start anything again.
        """
        if self._store is not None:
            with contextlib.suppress(dist.DistError, ValueError):  # the store went with torchrun
                first = json.loads(self._store.compare_set("end", "", json.dumps({"by": self.rank, "story": story})))
                if first["story"]["exit_code"] in for_good:
                    self._launch_store.set("ended for good", str(first["story"]["exit_code"]))
                return first["story"], first["by"] == self.rank
        return story, True

    def has_ended(self) -> bool:
        """True when another process has told how it ended."""
        return self._store is not None and self._store.check(["end"])

    def ask_to_stop(self) -> bool:
        """Before training: asks every process to stop where nothing is lost. False when it has begun, and `gather` will carry that."""
        return self._store is None or self._store.compare_set("phase", "", STOP).decode() != GO

    def is_to_stop(self) -> bool:
        """Before training: True when a process has asked for it."""
        return self._phase() == STOP

    def wait_for_all_to_stop(self) -> bool:
        """Waits until every process has come here. False when one has not in STOP_SECONDS, or has ended."""
        if self._store is not None:
            self._store.add("stopped", 1)
            deadline = time.monotonic() + STOP_SECONDS
            while self._store.add("stopped", 0) < self.size:
                if self.has_ended() or time.monotonic() > deadline:
                    return False
                time.sleep(POLL_SECONDS)
        return True

    def first_does(self, name: str, work: Callable[[], T], check_stop: Callable[[], None]) -> T:
        """What `work` gives in the first process, in all of them; it must be of what JSON holds. `name` is used once."""
        if self._store is None:
            return work()
        if self.is_first:
            value = work()
            self._store.set(name, json.dumps(value))
        else:
            _wait_for(self._store, name, check_stop)
            value = json.loads(self._store.get(name))
        return value

    @contextlib.contextmanager
    def first_of_machine_goes_first(self, name: str, check_stop: Callable[[], None]) -> Iterator[None]:
        """The block is run by one process of each machine, then by the others, who find in the caches what it left."""
        if self._store is None:
            yield
            return
        key = f"{name}/{self.rank - self.local_rank}"
        if self.local_rank:
            _wait_for(self._store, key, check_stop)
        yield
        if not self.local_rank:
            self._store.set(key, "done")

    def form_group(self, device: torch.device, timeout_seconds: float, check_stop: Callable[[], None]) -> None:
        """Waits for all processes, without a limit, and joins them for collectives: gloo, and nccl for tensors on CUDA.

        From here on, `gather` carries who was told to stop.
        """
        if self.size == 1:
            return
        if self._store.add("ready", 1) == self.size:
            self._store.compare_set("phase", "", GO)  # one or the other: nobody stops while the others go on
        while self._phase() != GO:
            check_stop()
            time.sleep(POLL_SECONDS)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("group", self._store), rank=self.rank, world_size=self.size,
                                timeout=datetime.timedelta(seconds=timeout_seconds), device_id=device if device.type == "cuda" else None)

    def leave_group(self) -> None:
        """To be called by all together, where nothing failed: what a lost process leaves open cannot be closed, and goes with this process."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @torch.no_grad()
    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        """Copies the first process's values into everybody's tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def add_up(self, tensor: torch.Tensor) -> None:
        """Puts the sum over all processes into everybody's tensor: bitwise the same in all, and at each call for the same values."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def gather(self, *values: float) -> np.ndarray:
        """Everybody's values, the same in every process. float64 [W, len(values)]. No GPU is waited for."""
        table = torch.zeros(self.size, len(values), dtype=torch.float64)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(table)  # everybody's row, and zeros of the others
        return table.numpy()

    def _phase(self) -> str:
        return self._store.get("phase").decode() if self._store is not None and self._store.check(["phase"]) else ""


def _wait_for(store: dist.Store, key: str, check_stop: Callable[[], None]) -> None:
    while not store.check([key]):
        check_stop()
        time.sleep(POLL_SECONDS)


def lost_process(error: BaseException) -> str:
    """One line when the error is what torch raises when another process is gone or silent, "" when it is another."""
    is_one = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL")))
    return f"another process ended, or does not answer ({_one_line(error)})" if is_one else ""


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]
