"""Let the processes of a run stop together before training, and agree on how the run ended.

During training, `gather` (collectives.py) tells every process which of them received a signal.
"""

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Container
from typing import Any

import torch.distributed as dist

from microbert.runtime.outcome import Outcome
from microbert.runtime.store import Store
from microbert.runtime.waiting import POLL_SECONDS, never_stop, wait_until

STOP_SECONDS = 20.0  # for every process to notice a request to stop: torchrun kills them after 30
ORPHAN_SECONDS = 8.0  # for a process to save and exit after torchrun was killed
STOP, TRAIN = "stop", "train"  # values of the key "phase", which is set once: either all stop or all train


class Stopping:
    """Exchanges messages about stopping and ending. A single process has no store, and needs no messages.

    store: the store of this attempt. launch_store: the store of all attempts of the launch.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.store: Store | None = None
        self.launch_store: Store | None = None

    def ask_to_stop(self) -> bool:
        """Ask every process to stop before training. Return False if training has begun: then `gather` tells them."""
        return self.store is None or self.store.set_once("phase", STOP) != TRAIN

    def is_asked_to_stop(self) -> bool:
        """Return whether a process has asked all to stop before training."""
        return self._is_phase(STOP)

    def wait_for_all_to_stop(self) -> bool:
        """Wait until every process has called this. Return False after STOP_SECONDS, or if a process has ended."""
        if self.store is not None:
            self.store.add("stopped", 1)
            deadline = time.monotonic() + STOP_SECONDS
            while self.store.add("stopped", 0) < self.size:
                if self.has_a_process_ended() or time.monotonic() > deadline:
                    return False
                time.sleep(POLL_SECONDS)
        return True

    def wait_for_all_to_train(self, check_stop: Callable[[], None] = never_stop) -> None:
        """Wait without a limit until every process has called this. From then on `ask_to_stop` returns False."""
        if self.store is not None:
            if self.store.add("ready", 1) == self.size:
                self.store.set_once("phase", TRAIN)
            wait_until(lambda: self._is_phase(TRAIN), check_stop)

    def record_end(self, outcome: Outcome, final_codes: Container[int | None]) -> tuple[Outcome, bool]:
        """Record how this process ended. Return the outcome of the first process to end, and whether it is this one.

        final_codes: the exit codes after which later attempts of the launch end at once.
        """
        first: dict[str, Any] = {"by": self.rank, "outcome": dataclasses.asdict(outcome)}
        with contextlib.suppress(dist.DistError, ValueError):  # the store ended with torchrun, or does not answer
            if self.store is not None:
                first = json.loads(self.store.with_timeout().set_once("end", json.dumps(first)))
            if self.launch_store is not None and first["outcome"]["exit_code"] in final_codes:
                self.launch_store.with_timeout().set("final exit code", str(first["outcome"]["exit_code"]))
        return Outcome(**first["outcome"]), first["by"] == self.rank

    def has_a_process_ended(self) -> bool:
        return self.store is not None and self.store.check("end")

    def _is_phase(self, phase: str) -> bool:
        return self.store is not None and self.store.check("phase") and self.store.get("phase") == phase


def watch_parent(parent: int, on_loss: Callable[[], None]) -> None:
    """Call `on_loss` when the parent process has ended, and end this process at most ORPHAN_SECONDS later.

    parent: its process id.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        on_loss()
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
