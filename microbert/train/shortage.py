"""Running out of memory: how many sequences are computed at a time, and what follows when they are too many."""

import dataclasses
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from microbert.config.constants import ResolvedConfig
from microbert.data.row_lengths import describe_rows, most_positions, smaller_constants
from microbert.errors import Failed
from microbert.runtime.device import free_memory, out_of_memory
from microbert.runtime.distributed import World
from microbert.train.hardware import GB, Hardware
from microbert.train.step_memory import planned_training_bytes

T = TypeVar("T")


class BatchSizes:
    """Sequences computed at a time, halved in all processes whenever one of them runs out of memory.

    micro_batch: in training. evaluation: in evaluation, never more than in training. ran_short: whether memory has run
    out so far. step: number of the current step, for messages.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        vocab_size: int,
        device: torch.device,
        world: World,
        on_shortage: Callable[[], None],
    ) -> None:
        """on_shortage: called whenever memory has run out, to free what else holds memory."""
        self._config, self._vocab_size, self._device, self._world = config, vocab_size, device, world
        self._on_shortage = on_shortage
        self.micro_batch = min(config.micro_batch_size or config.batch_size, config.batch_size)
        self.evaluation = self.micro_batch
        self.ran_short, self.step = False, 0
        self._reason = ""  # torch's message

    def within_memory(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work`, which must not be None, or None if it runs out of memory."""
        self._reason = ""
        try:
            return work()
        except RuntimeError as error:
            self._reason = out_of_memory(error)
            if not self._reason:
                raise
        free_memory(self._device)  # outside of `except`: the error holds the tensors of `work`
        return None

    def halve_micro_batch(self, where: str, ranks: list[int]) -> None:
        """Halve it in all processes. ranks: of those that ran out of memory. Raises Failed at one sequence."""
        self.micro_batch = self._halve(self.micro_batch, where, ranks)
        self.evaluation = min(self.evaluation, self.micro_batch)

    def halve_evaluation(self, ranks: list[int]) -> None:
        """Halve it in all processes. ranks: of those that ran out of memory. Raises Failed at one sequence."""
        self.evaluation = self._halve(self.evaluation, "in evaluation ", ranks)

    def _halve(self, size: int, where: str, ranks: list[int]) -> int:
        """Return half the size. The first shortage may keep a size of 1, because it also frees the CUDA graphs."""
        processes = [f"process {ranks[0]} of {self._world.size}"] if self._world.size > 1 else []
        reason = ": ".join([*processes, self._reason] if self._reason else processes)
        if size == 1 and self.ran_short:
            config = dataclasses.replace(self._config, micro_batch_size=1)
            hardware = Hardware(self._device.type, None, self._world.size)
            planned = planned_training_bytes(config, self._vocab_size, hardware)
            raise Failed(
                f"step {self.step}: out of memory {where}with one sequence of {most_positions(config)} tokens at a "
                f"time, which needs about {planned / GB:.2f} GB ({reason}). Reduce {smaller_constants(config)}",
                ranks[0],
            )
        half = -(-size // 2)
        self.ran_short = True
        self._on_shortage()
        if self._world.rank == ranks[0]:  # this process has torch's message
            print(
                f"\nstep {self.step}: out of memory {where}with {describe_rows(size, self._config)} at a time "
                f"({reason}); repeating it, and continuing, with {describe_rows(half, self._config)} at a time",
                file=sys.stderr,
            )
        return half
