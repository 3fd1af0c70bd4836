"""The store: short texts under keys, through which the processes of a launch communicate before training.

Unlike a collective operation, waiting at the store has no time limit and can be interrupted.
"""

import datetime
import functools
import ipaddress
import socket
import sys
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from microbert.errors import InputError
from microbert.runtime.waiting import in_background, never_stop, wait_until

ANSWER_SECONDS = 3.0  # for the store to answer, once this process was asked to stop or has failed
CONNECT_SECONDS = 300.0  # for PyTorch to connect to a store that listens
PROBE_SECONDS = 1.0  # for one attempt to find out whether the store listens

T = TypeVar("T")


class Store:
    """A PyTorch store with text values. A lost store may never answer, so that requests run in the background."""

    def __init__(self, store: dist.Store, give_up: Callable[[], None] = never_stop) -> None:
        """give_up: called when an answer takes more than ANSWER_SECONDS. An exception from it ends the wait."""
        self._store, self._give_up = store, give_up

    def check(self, key: str) -> bool:
        """Return whether the key is set."""
        return self._request(self._store.check, [key])

    def get(self, key: str) -> str:
        return self._request(self._store.get, key).decode()

    def set(self, key: str, value: str) -> None:
        self._request(self._store.set, key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which starts at 0, and return its new value."""
        return self._request(self._store.add, key, amount)

    def set_once(self, key: str, value: str) -> str:
        """Set the key unless it is set already, and return its value."""
        return self._request(self._store.compare_set, key, "", value).decode()

    def wait_for(self, key: str, check_stop: Callable[[], None]) -> str:
        """Wait until another process has set the key, and return its value."""
        wait_until(lambda: self.check(key), check_stop)
        return self.get(key)

    def with_prefix(self, prefix: str) -> "Store":
        """Return the same store with a prefix before each key."""
        return Store(dist.PrefixStore(prefix, self._store), self._give_up)

    def with_timeout(self) -> "Store":
        """Return the same store, which raises DistError when an answer takes more than ANSWER_SECONDS."""
        return Store(self._store, _raise_timeout)

    def new_connection(self) -> dist.Store:
        """Return a PyTorch store with a connection of its own: on one connection, requests wait for each other."""
        return self._store.clone()  # type: ignore[attr-defined]  # missing from PyTorch's type stubs

    def _request(self, call: Callable[..., T], *arguments: object) -> T:
        return in_background(functools.partial(call, *arguments), self._give_up, ANSWER_SECONDS)


def _raise_timeout() -> None:
    raise dist.DistError(f"the store did not answer within {ANSWER_SECONDS:g} seconds")


def connect(host: str, port: int, is_server: bool) -> dist.Store:
    """Connect to the store, retrying without a limit. is_server: start the store in this process."""
    if is_server:
        return loopback_store(host, port) if is_loopback(host) else _tcp_store(host, port, is_master=True)
    wait_until(lambda: _is_listening(host, port))
    return _tcp_store(host, port, is_master=False)


def loopback_store(host: str = "127.0.0.1", port: int = 0) -> dist.TCPStore:
    """Start a store for the processes of this machine. PyTorch's own would listen on all network interfaces.

    port: 0 chooses a free one. Raises InputError where the port is in use.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    numeric_host = str(address[0])
    try:
        listener = socket.create_server((numeric_host, port), family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        raise InputError(
            f"MASTER_PORT = {port} cannot be used ({error.strerror}): choose another port, or leave it to torchrun"
        ) from error
    free_port = listener.getsockname()[1]
    return _tcp_store(numeric_host, free_port, is_master=True, listener=listener.detach())


def _tcp_store(host: str, port: int, is_master: bool, listener: int | None = None) -> dist.TCPStore:
    """listener: the descriptor of a socket that already listens at the port."""
    return dist.TCPStore(
        host,
        port,
        is_master=is_master,
        timeout=datetime.timedelta(seconds=CONNECT_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener,
        use_libuv=sys.platform != "win32",
    )


def _is_listening(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), PROBE_SECONDS).close()
    except OSError:  # not yet started, or its host name is not known yet
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether the host is this machine wherever it is looked up: "localhost" or an address such as 127.0.0.1.

    Other names may resolve to a loopback address here and to this machine's network address elsewhere.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def open_attempt(store: Store, name: str, size: int, check_stop: Callable[[], None]) -> Store:
    """On rank 0, start an attempt of the launch, and return its store once all processes have joined.

    torchrun keeps one store for all attempts, so that each attempt uses a prefix: its `name`. A greeting from a
    process of an earlier attempt is answered as well, but that process no longer exists.
    """
    attempt = store.with_prefix(name)

    def have_all_joined() -> bool:
        if attempt.add("joined", 0) >= size - 1:
            return True
        for greeting in (f"hello/{rank}" for rank in range(1, size)):
            if store.check(greeting):
                store.set(f"welcome/{store.get(greeting)}", name)
        return False

    wait_until(have_all_joined, check_stop)
    return attempt


def join_attempt(store: Store, name: str, rank: int, check_stop: Callable[[], None]) -> Store:
    """On another rank, wait for rank 0 to announce the attempt, and return its store. name: unique to this process."""
    store.set(f"hello/{rank}", name)
    attempt = store.with_prefix(store.wait_for(f"welcome/{name}", check_stop))
    attempt.add("joined", 1)
    return attempt
