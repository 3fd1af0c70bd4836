"""Collective operations: each process of a run calls them in the same order. Shapes: W processes."""

import datetime
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

MOST_VALUES = 6  # per process in one `gather`


class Collectives:
    """Collective operations among `size` processes, of which this one is `rank`. A single process needs no group.

    on_shortage: called on every rank with the ranks that lack memory; see `report_shortage`.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.on_shortage: Callable[[list[int]], None] = lambda ranks: None

    def _init_group(self, store: dist.Store, device: torch.device, timeout_seconds: float) -> None:
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(device)  # each thread has its own current device
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            store=dist.PrefixStore("group", store),
            rank=self.rank,
            world_size=self.size,
            timeout=datetime.timedelta(seconds=timeout_seconds),
            device_id=device if is_cuda else None,
        )

    def leave_group(self) -> None:
        """Destroy the group. Call it on every rank, but not after a process was lost: then it cannot be closed."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @torch.no_grad()
    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite the tensors of every rank with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by its sum over all ranks: bitwise identical on every rank, and at each call."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def gather(self, *values: float) -> np.ndarray:
        """Return the values of every rank. float64 [W, len(values)]. Does not wait for a GPU."""
        while True:
            table, short = self.try_gather(*values)
            if not short:
                return table
            self.on_shortage(short)

    def try_gather(self, *values: float) -> tuple[np.ndarray, list[int]]:
        """As `gather`, with the ranks that report a shortage instead of values. If there are any, gather again."""
        return self._gather(False, *values)

    def report_shortage(self) -> None:
        """Report that this rank lacks the memory for an update, which the other ranks have applied.

        The others learn it from their next `gather`, whatever that is for. `on_shortage` runs on every rank, and they
        gather again after this rank has repeated the update. A step without a shortage needs no message.
        """
        _, short = self._gather(True)
        self.on_shortage(short)

    def _gather(self, is_short: bool, *values: float) -> tuple[np.ndarray, list[int]]:
        table = torch.zeros(self.size, MOST_VALUES + 1, dtype=torch.float64)
        table[self.rank, : len(values)] = torch.tensor(values, dtype=torch.float64)
        table[self.rank, -1] = is_short
        self.all_reduce(table)  # each rank fills its own row
        return table[:, : len(values)].numpy(), table[:, -1].nonzero().flatten().tolist()
