"""The device that a run is planned for, at hand or not, and the size of model that preset "auto" chooses for it."""

import dataclasses

import torch

from microbert.runtime.device import GIB, has_bf16, memory_bytes
from microbert.runtime.distributed import World

GB = 1e9
# of the machine's memory: Python, torch and the libraries that read and export, 0.6 to 0.8; and before the first step,
# while the tensors do not exist yet, up to 0.5 for the word embeddings' start (model/word_vectors.py)
PROCESS_GB = 1.1
# of a GPU, in addition to PyTorch's allocator: CUDA and its libraries; NCCL, for several processes (an estimate)
GPU_CONTEXT_GB, NCCL_GB = 1.0, 1.0


@dataclasses.dataclass(frozen=True)
class Tier:
    """Layers and batch size that preset "auto" chooses for devices with at least this memory."""

    name: str
    at_least_bytes: float
    n_layers: int
    batch_size: int

    def values(self) -> dict[str, int]:
        """Return the constants and their values."""
        return {"n_layers": self.n_layers, "batch_size": self.batch_size}


# nominal sizes, as drivers report them: an "80 GB" GPU has 79.6 GiB, an A10 with "24 GB" 22.5
TIERS = (
    Tier("GPUs of 100 GB and more", 94 * GIB, 4, 16),
    Tier("GPUs of 40 GB and more", 38 * GIB, 6, 32),
    Tier("GPUs of 24 GB", 21.5 * GIB, 4, 8),
)
CPU_TIER = Tier("the CPU", 0, 4, 32)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The hardware of a plan.

    kind: "cuda", "mps" or "cpu". memory_bytes: of each process's device; None if unknown, never for "cuda".
    n_processes: of the run. has_bf16: of a GPU; plans for a CPU count fp32, because attention stays in it.
    """

    kind: str
    memory_bytes: int | None
    n_processes: int = 1
    has_bf16: bool = False

    def outside_gb(self) -> float:
        """Return the memory of a process outside its tensors and their allocator, in GB."""
        return GPU_CONTEXT_GB + NCCL_GB * (self.n_processes > 1) if self.kind == "cuda" else PROCESS_GB

    def tier(self) -> Tier:
        """Return the tier of preset "auto"."""
        if self.kind != "cuda":
            return CPU_TIER
        return next((tier for tier in TIERS if self._has(tier.at_least_bytes)), TIERS[-1])

    def is_below_tiers(self) -> bool:
        """Return whether this is a GPU with less memory than the smallest tier."""
        return self.kind == "cuda" and not self._has(TIERS[-1].at_least_bytes)

    def _has(self, n_bytes: float) -> bool:
        return self.memory_bytes is not None and self.memory_bytes >= n_bytes


def hardware_of(device: torch.device, world: World) -> Hardware:
    """Return the hardware at hand."""
    return Hardware(device.type, memory_bytes(device, world), world.size, has_bf16(device))
