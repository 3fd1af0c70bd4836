"""The memory plan of a run, and how the run stays within its budget: micro-batch and cap."""

import bisect
import dataclasses

import torch

from microbert.config.constants import BY_TIER, Config, ResolvedConfig
from microbert.data.row_lengths import describe_rows, most_positions, smaller_constants
from microbert.data.shards import Tokens
from microbert.errors import InputError
from microbert.runtime.device import GIB, limit_memory
from microbert.runtime.run import Run
from microbert.train.hardware import GB, Hardware, hardware_of
from microbert.train.step_memory import is_planned_in_bf16, planned_outside_graphs, planned_tensors

NOT_GIVEN_BACK = 0.5  # of the tensors: what the C library keeps of freed memory
ALLOCATOR_GB = 0.5  # what CUDA's allocator loses by rounding up and keeps for cuBLAS: 0.47 at most (docs/memory.md)
OUTSIDE_GRAPHS = "outside CUDA graphs"
MARGIN = "context and margin"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The peak memory of a process. parts: bytes by purpose. budget: bytes; None without a limit."""

    parts: dict[str, float]
    budget: float | None
    micro_batch_size: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.budget is None or self.total <= self.budget


def plan_memory(config: ResolvedConfig, vocab_size: int, hardware: Hardware) -> Plan:
    """Return the plan for the micro-batch of the constants, or for the fewest micro-batches of equal size that fit.

    Raises InputError if not even one sequence fits.
    """
    budget = _budget(config, hardware)

    def plan(size: int) -> Plan:
        tensors = planned_tensors(dataclasses.replace(config, micro_batch_size=size), vocab_size, hardware)
        margin = ALLOCATOR_GB * GB if hardware.kind == "cuda" else NOT_GIVEN_BACK * sum(tensors.values())
        if hardware.kind == "cuda" and config.cuda_graphs:
            tensors[OUTSIDE_GRAPHS] = planned_outside_graphs(config, size, vocab_size, hardware)
        return Plan(tensors | {MARGIN: hardware.outside_gb() * GB + margin}, budget, size)

    if config.micro_batch_size is not None:
        return plan(min(config.micro_batch_size, config.batch_size))
    whole = plan(config.batch_size)  # it needs no memory for gradients of earlier micro-batches
    if whole.fits:
        return whole
    largest = bisect.bisect_left(range(1, config.batch_size), True, key=lambda size: not plan(size).fits)
    if not largest:
        raise InputError(_too_large(min(plan(1), whole, key=lambda plan: plan.total), config, hardware))
    n_parts = -(-config.batch_size // largest)
    return plan(-(-config.batch_size // n_parts))


def _budget(config: ResolvedConfig, hardware: Hardware) -> float | None:
    """Return the smaller of memory_budget_gb and the device's memory, in bytes; None if neither is known.

    Raises InputError if it leaves nothing for tensors.
    """
    asked = config.memory_budget_gb and config.memory_budget_gb * GB
    budget = min((limit for limit in (asked, hardware.memory_bytes) if limit), default=None)
    if budget is not None and budget <= hardware.outside_gb() * GB:
        source = "" if budget == hardware.memory_bytes else f" (memory_budget_gb = {config.memory_budget_gb:g})"
        raise InputError(
            f"{budget / GB:.1f} GB of memory{source} are too little: a process uses {hardware.outside_gb():.1f} GB "
            "without its tensors"
        )
    return budget


def _too_large(least: Plan, config: ResolvedConfig, hardware: Hardware) -> str:
    """Return the error message. least: the plan with the least memory, of more than the budget."""
    available = least.budget or 0.0
    larger = ""
    if available != hardware.memory_bytes:
        larger = f", or raise memory_budget_gb = {config.memory_budget_gb:g}"
    return (
        f"one sequence of {most_positions(config)} tokens needs {least.total / GB:.1f} GB with its model, and "
        f"{available / GB:.1f} GB are available: reduce {smaller_constants(config)}{larger}"
    )


def describe_memory_plan(plan: Plan, config: ResolvedConfig, hardware: Hardware) -> str:
    """Return the plan as a table, with a warning if it does not fit."""
    owner = "each process"
    if hardware.kind == "cuda":
        owner = "each GPU" if hardware.n_processes > 1 else "the GPU"
    size = plan.micro_batch_size
    n_parts = -(-config.batch_size // size)
    repeated = f", {n_parts} times per step" if n_parts > 1 else ""
    lines = [
        f"peak memory of {owner}, with {describe_rows(size, config)} at a time"
        f"{', in bf16' if is_planned_in_bf16(config, hardware) else ''}{repeated}:"
    ]
    lines += [f"  {name:<22}{n_bytes / GB:>8.2f} GB" for name, n_bytes in plan.parts.items() if n_bytes]
    limit = f" of {plan.budget / GB:.1f} GB" if plan.budget else ""
    lines.append(f"  {'total':<22}{plan.total / GB:>8.2f} GB{limit}")
    if not plan.fits:
        lines.append("warning: that is more than available; micro_batch_size = None chooses what fits")
    return "\n".join(lines)


def describe_tier(given: Config, hardware: Hardware) -> str:
    """Return how the preset set layers and batch. given: filled in, before the batch is resolved."""
    size = f"{given.n_layers} layers, batch {given.batch_size} for each process"
    if given.preset != "auto":
        return f'preset "{given.preset}": {size}; constants that are set take precedence'
    tier = hardware.tier()
    if tier.values() == {name: getattr(given, name) for name in BY_TIER}:
        line = f'preset "auto": {size}, the tier of {tier.name}; constants that are set take precedence'
    else:
        line = (
            f'preset "auto": {size}, as set or as in the checkpoint; the tier of {tier.name} has {tier.n_layers} '
            f"layers, batch {tier.batch_size}"
        )
    if hardware.memory_bytes is not None and hardware.is_below_tiers():
        line += (
            f"\nhint: a GPU of {hardware.memory_bytes / GIB:.0f} GiB is smaller than v4 is made for; "
            "mlm_pretrain_v1.py to mlm_pretrain_v3.py need less"
        )
    return line


def resolve_memory_plan(given: Config, config: ResolvedConfig, vocab_size: int, hardware: Hardware) -> Plan:
    """Return the plan of a run. A checkpoint's micro-batch in `config` counts only if it is smaller than the plan's."""
    planned = plan_memory(dataclasses.replace(config, micro_batch_size=given.micro_batch_size), vocab_size, hardware)
    if config.micro_batch_size is not None and config.micro_batch_size < planned.micro_batch_size:
        return plan_memory(config, vocab_size, hardware)
    return planned


def apply_memory_budget(run: Run, tokens: Tokens, device: torch.device) -> None:
    """Print the plan, set the micro-batch of `run.config` and cap the memory. Call it before any large allocation.

    The first process plans, for all. Raises InputError if not even one sequence fits.
    """
    hardware = hardware_of(device, run.world)
    if run.config.preset is not None:
        print(describe_tier(run.given, hardware))

    def plan() -> int:
        resolved = resolve_memory_plan(run.given, run.config, len(tokens.token_counts), hardware)
        print(describe_memory_plan(resolved, run.config, hardware))
        return resolved.micro_batch_size

    run.config = dataclasses.replace(run.config, micro_batch_size=run.world.on_rank_0("memory", plan, run.check_stop))
    cap_memory(run.config, hardware, device)


def cap_memory(config: Config, hardware: Hardware, device: torch.device) -> None:
    """Limit the memory of tensors to memory_budget_gb, if there is one and the device supports it."""
    if config.memory_budget_gb is not None:
        limit_memory(device, (config.memory_budget_gb - hardware.outside_gb()) * GB)
