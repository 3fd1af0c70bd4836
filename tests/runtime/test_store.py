"""The store: requests that are never answered, and which hosts are loopback addresses."""

import threading

import pytest
import torch.distributed as dist

import microbert.runtime.store
from microbert.errors import Stopped
from microbert.runtime.stopping import Stopping
from microbert.runtime.store import Store, is_loopback


class Silent:
    """A PyTorch store that never answers."""

    def __init__(self):
        self.held = threading.Event()

    def check(self, keys):
        self.held.wait()


def raise_stopped():
    raise Stopped("stopped")


def test_a_store_that_does_not_answer_does_not_delay_a_process_that_was_asked_to_stop(monkeypatch):
    monkeypatch.setattr(microbert.runtime.store, "ANSWER_SECONDS", 0.1)
    silent = Silent()
    stopping = Stopping(rank=0, size=2)
    stopping.store = Store(silent, raise_stopped)
    with pytest.raises(Stopped):
        stopping.has_a_process_ended()
    with pytest.raises(dist.DistError, match="did not answer"):
        stopping.store.with_timeout().check("end")
    silent.held.set()


@pytest.mark.parametrize(
    "host, expected",
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("::1", True),
        ("[::1]", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("host0", False),
        ("", False),
    ],
)
def test_only_hosts_that_mean_this_machine_everywhere_are_loopback(host, expected):
    assert is_loopback(host) == expected
