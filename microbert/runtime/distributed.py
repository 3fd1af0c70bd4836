"""The processes of a run, as torchrun starts them.

Environment variables tell a process which of how many it is, and where all meet: at a store of short texts under keys. While tokens are
prepared, which may take hours, the processes speak through the store alone, because waiting there has no end and can be interrupted. For
training they form a group, whose collectives are fast and have a time limit. A process that is alone needs neither.
Shapes: W processes.
"""

import contextlib
import datetime
import functools
import ipaddress
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterator
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from microbert.errors import InputError

POLL_SECONDS = 0.05
MEETING_SECONDS = 300.0  # for the processes of all machines to find the store, and each other there; torchrun starts them at the same time
STOP_SECONDS = 20.0  # for every process to notice that one was told to stop: torchrun kills after 30
ORPHAN_SECONDS = 8.0  # for a process to save and leave, once torchrun itself was killed
ANSWER_SECONDS = 3.0  # for the store or the others to answer a process that was told to stop or has failed
PROBE_SECONDS = 1.0  # for one attempt to connect to the store
LOOPBACK_NAMES = ("lo", "lo0")  # of network interfaces, on Linux and on macOS
MOST_VALUES = 6  # of a process in a gathering
STOP, GO = "stop", "go"

T = TypeVar("T")


class _Store:
    """A torch store whose answers are waited for in the background: a lost one may never answer, not even within its
    timeout."""

    def __init__(self, store: dist.Store, give_up: Callable[[], None]) -> None:
        """give_up: called where an answer takes more than ANSWER_SECONDS; may raise what ends the waiting."""
        self.of_torch, self._give_up = store, give_up

    def __getattr__(self, name: str) -> Callable[..., object]:
        call = getattr(self.of_torch, name)
        return lambda *arguments: in_background(functools.partial(call, *arguments), self._give_up, ANSWER_SECONDS)

    def below(self, prefix: str) -> "_Store":
        """The same store, with a prefix before each key."""
        return _Store(dist.PrefixStore(prefix, self.of_torch), self._give_up)

    def without_patience(self) -> "_Store":
        """The same store. Raises DistError where an answer takes more than ANSWER_SECONDS."""
        return _Store(self.of_torch, _raise_no_answer)


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
        self.is_restart = any(
            variables.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
        )
        self.launch = variables.get("TORCHELASTIC_RUN_ID", "")
        self.one_thread_asked = variables.get("OMP_NUM_THREADS") == "1"
        self.give_up: Callable[[], None] = lambda: (
            None
        )  # called where others take long to answer; may raise what ends the waiting
        self.on_shortage: Callable[[list[int]], None] = lambda ranks: (
            None
        )  # called in all processes; see report_shortage
        self._parent = os.getppid()
        self._store: _Store | None = None  # of this attempt
        self._launch_store: _Store | None = None  # of all attempts

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
        deadline = time.monotonic() + MEETING_SECONDS
        host, port = _meeting_place(self.size)

        def check() -> None:
            check_stop()
            if time.monotonic() > deadline:
                missing = (
                    f"not all of {self.size} processes came"
                    if self._launch_store
                    else f"no store answered at {host}:{port}"
                )
                raise dist.DistError(f"{missing} within {MEETING_SECONDS:.0f} seconds")

        store = _Store(in_background(lambda: self._open_store(host, port), check), lambda: self.give_up()).below(
            "microbert"
        )
        self._launch_store, mine = store, uuid.uuid4().hex
        try:
            if store.check(["ended for good"]):
                raise SystemExit(int(store.get("ended for good")))
            if self.is_first:
                # torchrun's count of restarts stays 0 on a machine where nothing failed
                self.is_restart = store.add("attempts", 1) > 1 or self.is_restart
                attempt = store.below(mine)
                while attempt.add("arrived", 0) < self.size - 1:
                    for hello in (f"hello/{rank}" for rank in range(1, self.size)):
                        if store.check([hello]):
                            store.set(f"welcome/{store.get(hello).decode()}", mine)
                    check()
                    time.sleep(POLL_SECONDS)
            else:
                store.set(f"hello/{self.rank}", mine)
                _wait_for(store, f"welcome/{mine}", check)
                attempt = store.below(store.get(f"welcome/{mine}").decode())
                attempt.add("arrived", 1)
        except dist.DistError:
            check_stop()  # where all were told to stop, the process that holds the store may have left first
            raise
        self._store = attempt

    def _open_store(self, host: str, port: int) -> dist.Store:
        """Connect to the store, trying until it answers.

        Without torchrun, the first process holds it, and the others' connections are not waited for.
        """
        options = {
            "timeout": datetime.timedelta(seconds=MEETING_SECONDS),
            "wait_for_workers": False,
            "use_libuv": sys.platform != "win32",
        }
        if self.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return (
                loopback_store(host, port, **options)
                if is_loopback(host)
                else dist.TCPStore(host, port, is_master=True, **options)
            )
        while not _is_listening(host, port):
            time.sleep(POLL_SECONDS)
        return dist.TCPStore(host, port, is_master=False, **options)

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
        first = {"by": self.rank, "story": story}
        with contextlib.suppress(dist.DistError, ValueError):  # the store went with torchrun, or does not answer
            if self._store is not None:
                first = json.loads(self._store.without_patience().compare_set("end", "", json.dumps(first)))
            if self._launch_store is not None and first["story"]["exit_code"] in for_good:
                self._launch_store.without_patience().set("ended for good", str(first["story"]["exit_code"]))
        return first["story"], first["by"] == self.rank

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

    def on_rank_0(self, name: str, work: Callable[[], T], check_stop: Callable[[], None]) -> T:
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
    def local_rank_0_first(self, name: str, check_stop: Callable[[], None]) -> Iterator[None]:
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
        if self.local_size == self.size or is_loopback(os.environ.get("MASTER_ADDR", "")):
            _keep_gloo_local()

        def form() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has a current device of its own
            # with a connection of its own, because a store answers one question at a time
            store = dist.PrefixStore("group", self._store.of_torch.clone())
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=datetime.timedelta(seconds=timeout_seconds),
                device_id=device if device.type == "cuda" else None,
            )

        begun = time.monotonic()

        def check() -> None:
            check_stop()
            if time.monotonic() > begun + ANSWER_SECONDS:
                self.give_up()

        in_background(form, check)

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

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Puts the sum over all processes into everybody's tensor: bitwise the same in all, and at each call for the same values."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def gather(self, *values: float) -> np.ndarray:
        """Everybody's values, the same in every process. float64 [W, len(values)]. No GPU is waited for."""
        while True:
            table, short = self.try_gather(*values)
            if not short:
                return table
            self.on_shortage(short)

    def try_gather(self, *values: float) -> tuple[np.ndarray, list[int]]:
        """As `gather`, and the ranks that had none because they report a shortage: then all have to gather again."""
        return self._gather(False, *values)

    def report_shortage(self) -> None:
        """Tell all processes that this one has no memory for an update, which the others have done.

        The others hear of it when they gather next, whatever that is for; `on_shortage` is called in every process, and
        they gather again when this one has repeated the update and comes to the same place. So all do the same, and a
        step without a shortage needs no message for it.
        """
        _, short = self._gather(True)
        self.on_shortage(short)

    def _gather(self, is_short: bool, *values: float) -> tuple[np.ndarray, list[int]]:
        table = torch.zeros(self.size, MOST_VALUES + 1, dtype=torch.float64)
        table[self.rank, : len(values)] = torch.tensor(values, dtype=torch.float64)
        table[self.rank, -1] = is_short
        if self.size > 1:
            dist.all_reduce(table)  # everybody's row, and zeros of the others
        return table[:, : len(values)].numpy(), table[:, -1].nonzero().flatten().tolist()

    def _phase(self) -> str:
        return self._store.get("phase").decode() if self._store is not None and self._store.check(["phase"]) else ""


def in_background(call: Callable[[], T], check: Callable[[], None], after: float = 0.0) -> T:
    """Return what `call` returns.

    Where it blocks in C++, Python handles no signal; so a thread calls it, and this one calls `check` meanwhile. What
    `check` raises ends the waiting, but not the call, which ends with the process. after: the seconds until `check` is
    called first.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    begun = time.monotonic()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(POLL_SECONDS)
    while thread.is_alive():
        if time.monotonic() >= begun + after:
            check()
        thread.join(POLL_SECONDS)
    if errors:
        raise errors[0]
    return results[0]


def _raise_no_answer() -> None:
    raise dist.DistError(f"the store did not answer within {ANSWER_SECONDS:g} seconds")


def _meeting_place(n_processes: int) -> tuple[str, int]:
    """Host and port of the store. Raises InputError where the environment does not say them."""
    host, port = os.environ.get("MASTER_ADDR", "").strip("[]"), os.environ.get("MASTER_PORT", "")
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)):
        if not value:
            raise InputError(
                f"WORLD_SIZE = {n_processes}, but {name} is not set: start several processes with torchrun"
            )
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"MASTER_PORT = {port!r} is not a port: start several processes with torchrun")
    return host, int(port)


def _is_listening(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), PROBE_SECONDS).close()
    except OSError:  # not yet, or its name is not known yet
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can mean itself by that: "localhost" or an address such as 127.0.0.1.

    Names that lead there mean others elsewhere.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def loopback_store(host: str = "127.0.0.1", port: int = 0, **options: object) -> dist.TCPStore:
    """A store in this process, for processes of this machine: torch's own listens on all interfaces.

    port: 0 takes a free one. Raises InputError where it is taken.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        listening = socket.create_server(address[:2], family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        raise InputError(f"MASTER_PORT = {port} cannot be listened at ({error.strerror}): give another one") from error
    port = listening.getsockname()[1]
    return dist.TCPStore(address[0], port, is_master=True, master_listen_fd=listening.detach(), **options)


def _keep_gloo_local() -> None:
    """Let gloo listen on the loopback interface alone, unless GLOO_SOCKET_IFNAME says another."""
    names = [name for _, name in socket.if_nameindex()] if sys.platform != "win32" else []
    if name := next(filter(names.__contains__, LOOPBACK_NAMES), None):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _wait_for(store: _Store, key: str, check_stop: Callable[[], None]) -> None:
    while not store.check([key]):
        check_stop()
        time.sleep(POLL_SECONDS)


def lost_process(error: BaseException) -> str:
    """One line when the error is what torch raises when another process is gone or silent, "" when it is another."""
    is_one = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
    )
    return f"another process ended, or does not answer ({_one_line(error)})" if is_one else ""


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]
