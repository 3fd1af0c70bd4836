"""What a training process will hold in memory, and how it is held to a budget: tiers, plan, micro-batch, cap.

Everything but the cap is arithmetic on the constants and on what the device has, so that a plan can be made for a GPU that is not at hand.
Shapes: B sequences of a micro-batch, T = max_seq_len, D = n_embed, L layers, H heads, M masked slots a sequence, N = B * M, V vocabulary,
C rows of logits at a time, W processes.
"""

import bisect
import dataclasses

import torch

from .config import Config, InputError
from .device import GIB, limit_memory, memory_bytes
from .distributed import World
from .loss import chunk_rows
from .masking import n_slots
from .model import ModelConfig
from .run import Run
from .tokens import Tokens

BYTES = 4  # fp32; what is narrower is counted as a half of one
GB = 1e9
# of the machine's memory: Python, torch, the libraries that read and those that export. Most are loaded last, by the export, so a whole
# run takes about 0.3 GB more than train/peak_memory_gb says of its training
PROCESS_GB = 0.7
# of a GPU, reckoned: what CUDA, the libraries and nccl take beside PyTorch's allocator; what the allocator loses by rounding up
GPU_CONTEXT_GB, ALLOCATOR_GB = 1.0, 0.5
# kept for the backward pass, in units of [B, T, D]: a layer's query, key, value, attention and a copy of it (5); sum and norm (2);
# expansion and GELU (8); sum, which is also the norm's input (1). In bf16 all but the two sums take a half, and the norm's output is only kept
# as the copy in bf16 that the next product takes
KEPT_A_LAYER, KEPT_A_LAYER_NARROW = 16, 9.5
KEPT_BY_EMBEDDINGS = 4
KEPT_BY_HEAD = 4  # [B, M, D]
USED_BY_BACKWARD = 6  # of the last layer: gradients of the expansion and of what goes round it, less what is no longer needed
KEPT_BY_DROPOUT = 0.25  # a byte for each value
USED_BY_DROPOUT = 8  # while random numbers of 64 bits are made


@dataclasses.dataclass(frozen=True)
class Tier:
    """What preset "auto" takes on a device with so much memory."""

    name: str
    at_least_bytes: float
    n_layers: int
    batch_size: int

    def values(self) -> dict[str, int]:
        return {"n_layers": self.n_layers, "batch_size": self.batch_size}


# nominal sizes, as drivers report them: an "80 GB" GPU has 79.6 GiB, an A10 with "24 GB" 22.5
TIERS = (Tier("GPUs of 100 GB and more", 94 * GIB, 4, 16), Tier("GPUs of 40 GB and more", 38 * GIB, 6, 32), Tier("GPUs of 24 GB", 21.5 * GIB, 4, 8))
CPU_TIER = Tier("the CPU", 0, 4, 32)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a plan is for. kind: "cuda", "mps" or "cpu". memory_bytes: of each process's device, None when unknown. n_processes: of the run."""

    kind: str
    memory_bytes: int | None
    n_processes: int = 1

    def tier(self) -> Tier:
        if self.kind != "cuda":
            return CPU_TIER
        return next((tier for tier in TIERS if self.memory_bytes >= tier.at_least_bytes), TIERS[-1])

    def is_below_tiers(self) -> bool:
        return self.kind == "cuda" and self.memory_bytes < TIERS[-1].at_least_bytes


def hardware_of(device: torch.device, world: World) -> Hardware:
    return Hardware(device.type, memory_bytes(device, world), world.size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The most that a process holds at once. parts: bytes by purpose. budget: bytes, None where nothing limits them."""

    parts: dict[str, float]
    budget: float | None
    micro_batch_size: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.budget is None or self.total <= self.budget


def plan_memory(config: Config, vocab_size: int, hardware: Hardware) -> Plan:
    """The plan with the micro-batch that the constants ask for; else with the fewest micro-batches of a size that fits, all alike.

    Raises InputError where not even one sequence fits.
    """
    limits = [limit for limit in (config.memory_budget_gb and config.memory_budget_gb * GB, hardware.memory_bytes) if limit]
    budget = min(limits, default=None)

    def plan(size: int) -> Plan:
        margins = {"context and margin": (GPU_CONTEXT_GB + ALLOCATOR_GB if hardware.kind == "cuda" else PROCESS_GB) * GB}
        sized = dataclasses.replace(config, micro_batch_size=size)
        return Plan(planned_tensors(sized, vocab_size, hardware) | margins, budget, size)

    if config.micro_batch_size is not None:
        return plan(min(config.micro_batch_size, config.batch_size))
    largest = bisect.bisect_left(range(1, config.batch_size + 1), True, key=lambda size: not plan(size).fits)
    if not largest:
        one = plan(1)
        raise InputError(f"one sequence of {config.max_seq_len} tokens takes {one.total / GB:.1f} GB with its model, and {one.budget / GB:.1f} GB are there: "
                         "a smaller n_embed, n_layers, vocab_size or max_seq_len takes less"
                         + (f", or raise memory_budget_gb = {config.memory_budget_gb:g}" if budget != hardware.memory_bytes else ""))
    n_parts = -(-config.batch_size // largest)
    return plan(-(-config.batch_size // n_parts))


def tell_memory(plan: Plan, config: Config, hardware: Hardware) -> None:
    """Prints the plan as a table."""
    what = "each GPU" if hardware.kind == "cuda" and hardware.n_processes > 1 else "the GPU" if hardware.kind == "cuda" else "each process"
    n_parts = -(-config.batch_size // plan.micro_batch_size)
    print(f"memory of {what}, at most, with {plan.micro_batch_size} sequences of {config.max_seq_len} tokens at a time"
          + (f", {n_parts} times a step" if n_parts > 1 else "") + ":")
    for name, size in plan.parts.items():
        if size:
            print(f"  {name:<22}{size / GB:>8.2f} GB")
    print(f"  {'in all':<22}{plan.total / GB:>8.2f} GB" + (f" of {plan.budget / GB:.1f}" if plan.budget else ""))
    if not plan.fits:
        print(f"warning: that is more than there is: leave micro_batch_size = None, which takes what fits, or make it smaller than {plan.micro_batch_size}")


def tell_tier(config: Config, hardware: Hardware) -> None:
    """Prints what the preset made of the device."""
    is_by_tier = config.preset == "auto"
    where = f" on a GPU of {hardware.memory_bytes / GIB:.0f} GiB" if hardware.kind == "cuda" and is_by_tier else ""
    tier = f", the tier of {hardware.tier().name}" if is_by_tier else ""
    print(f'preset "{config.preset}"{where}{tier}: {config.n_layers} layers, batch {config.batch_size} for each process; a constant that is set wins')
    if is_by_tier and hardware.is_below_tiers():
        print("hint: this GPU is smaller than v4 is made for; mlm_pretrain_v1.py to v3 take less")


def hold_to_budget(run: Run, tokens: Tokens, device: torch.device) -> None:
    """Tells the plan, settles run.config's micro-batch by it, and sets the cap. Before anything large is allocated.

    The first process plans, the others follow. Raises InputError where not even one sequence fits.
    """
    hardware, vocab_size = hardware_of(device, run.world), len(tokens.token_counts)
    if run.config.preset is not None:
        tell_tier(run.config, hardware)

    def plan() -> int:
        planned = plan_memory(dataclasses.replace(run.config, micro_batch_size=run.given.micro_batch_size), vocab_size, hardware)
        if run.config.micro_batch_size is not None and run.config.micro_batch_size < planned.micro_batch_size:  # memory has run out before
            planned = plan_memory(run.config, vocab_size, hardware)
        tell_memory(planned, run.config, hardware)
        return planned.micro_batch_size

    run.config = dataclasses.replace(run.config, micro_batch_size=run.world.first_does("memory", plan, run.check_stop))
    if run.config.memory_budget_gb is not None:
        limit_memory(device, (run.config.memory_budget_gb - GPU_CONTEXT_GB) * GB)


def count_parameters(config: ModelConfig) -> int:
    """Of the model with its tied output weights, without building it."""
    D, V = config.n_embed, config.vocab_size
    embeddings = (V + config.max_seq_len + 2) * D + 2 * D
    layer = 4 * (D * D + D) + 2 * D * config.n_inner + config.n_inner + D + 4 * D
    head = D * D + D + 2 * D + V
    return embeddings + config.n_layers * layer + head


def planned_tensors(config: Config, vocab_size: int, hardware: Hardware) -> dict[str, float]:
    """Bytes of the tensors of a training step by purpose, when they take the most at once.

    One of six moments is the fullest: the last layer's dropout; the last chunk of the loss, whose gradient grows beside the hidden states; the
    begin of the backward pass, when that gradient is there twice, as it is and scaled; the last layer's backward pass; its end, when the word
    embeddings' gradient as output and as input are added up; the reduction, when all gradients are there a second time.
    """
    model = ModelConfig(vocab_size, config.n_layers, config.n_heads, config.n_embed, config.max_seq_len)
    parameters = count_parameters(model)
    B = min(config.micro_batch_size or config.batch_size, config.batch_size)
    L, H, T, D, V = config.n_layers, config.n_heads, config.max_seq_len, config.n_embed, vocab_size
    N = B * n_slots(T, config.mlm_probability)
    C = min(chunk_rows(hardware.kind, V), N)
    is_narrow = config.dtype == "bfloat16" or (config.dtype == "auto" and hardware.kind == "cuda")
    accumulated = parameters if B < config.batch_size else 0  # the gradients of the micro-batches before
    narrow_weights = (parameters - V) / 2 * is_narrow
    dropout = KEPT_BY_DROPOUT * (2 * L + 1) * (config.dropout > 0)
    kept = KEPT_A_LAYER_NARROW if is_narrow else KEPT_A_LAYER
    layers = B * T * (D * (kept * L + KEPT_BY_EMBEDDINGS + dropout) + L * (H + 4) + 2)  # with attention's sums, and each norm's mean and deviation
    hidden = layers + N * (KEPT_BY_HEAD * D + 2) + narrow_weights
    moments = [
        {"gradients": accumulated, "activations": layers + narrow_weights + USED_BY_DROPOUT * B * T * D * (config.dropout > 0)},
        {"gradients": accumulated + V * D + 2 * V + N * D, "activations": hidden,
         "logits, a chunk": C * V + 3 * C * D + is_narrow * (C * V / 2 + V * D)},
        {"gradients": accumulated + 2 * V * D + V + 2 * N * D, "activations": hidden},
        {"gradients": accumulated + V * D + V + 5 * D * D, "activations": layers + narrow_weights + USED_BY_BACKWARD * B * T * D},
        {"gradients": parameters + 2 * V * D + (V * D if accumulated else 0), "activations": KEPT_BY_EMBEDDINGS * B * T * D},
        {"gradients": parameters, "communication": parameters * (hardware.n_processes > 1)},
    ]
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    numbers = {"weights": parameters, "Adam's moments": 2 * parameters, "gradients": 0, "activations": 0, "logits, a chunk": 0, "communication": 0} | fullest
    numbers["activations"] += 2 * (B * T + 3 * N)  # token ids, int64
    return {name: BYTES * number for name, number in numbers.items()}


def planned_training_bytes(config: Config, vocab_size: int, hardware: Hardware = Hardware("cpu", None)) -> int:
    """The most that the tensors of a training step take at once."""
    return round(sum(planned_tensors(config, vocab_size, hardware).values()))
