"""What a training process will hold in memory, and how it is held to a budget: tiers, plan, micro-batch, cap.

Everything but the cap is arithmetic on the constants and on what the device has, so that a plan can be made for a GPU that is not at hand.
Shapes: B sequences of a micro-batch, T = max_seq_len, D = n_embed, L layers, H heads, M masked slots a sequence, N = B * M, V vocabulary,
C rows of logits at a time, W processes.
"""

import bisect
import dataclasses

import torch

from microbert.config.constants import BY_TIER, Config
from microbert.data.masking import EVALUATION_PROBABILITY, n_slots
from microbert.data.shards import Tokens
from microbert.errors import InputError
from microbert.model.build import count_parameters, shape_of
from microbert.model.layers import ModelConfig
from microbert.model.loss import THIN, chunk_rows
from microbert.runtime.device import GIB, has_bf16, limit_memory, memory_bytes
from microbert.runtime.distributed import World
from microbert.runtime.run import Run

BYTES = 4  # fp32; what is narrower is counted as a half of one
GB = 1e9
# of the machine's memory: Python, torch, the libraries that read and those that export; and, of the tensors, what the C library keeps of those
# that come and go
PROCESS_GB, NOT_GIVEN_BACK = 0.8, 0.5
# of a GPU: what CUDA and its libraries take beside PyTorch's allocator, and nccl, for several processes (reckoned); what the allocator loses by rounding up
# and keeps for cuBLAS (0.47 at most where it was measured, docs/memory.md)
GPU_CONTEXT_GB, NCCL_GB, ALLOCATOR_GB = 1.0, 1.0, 0.5
# kept for the backward pass, in units of [B, T, D]; in the last layer of [B, M, D], but for keys and values. BERT's layer: query, key, value, attention and a
# copy of it (5); sum and norm (2); expansion and GELU (8); sum, which is also the norm's input (1). A modern one: the norms (2); query, key, value, two of
# them turned, attention and a copy of it (7); the sums (2); and in units of [B, T, n_inner] expansion (2), GELU and the gated product (2).
# In bf16 all but the sums take a half, and BERT's norms are only kept as the copy in bf16 that the next product takes
KEPT_A_LAYER, KEPT_A_LAYER_NARROW = {"bert": 8, "modern": 11}, {"bert": 5.5, "modern": 6.5}
KEPT_OF_INNER, KEPT_OF_INNER_NARROW = {"bert": 2, "modern": 4}, {"bert": 1, "modern": 2}  # of [B, T, n_inner]
KEPT_OF_ALL_TOKENS = {"bert": 2, "modern": 4}  # by the last layer: keys and values; the norm, and the keys turned
KEPT_BY_EMBEDDINGS = 4
KEPT_BY_HEAD = 4  # [B, M, D]
USED_BY_BACKWARD = (
    6  # of the last whole layer: gradients of the expansion and of what goes round it, less what is no longer needed
)
USED_AT_THE_END = 3  # gradients of the first layer's query, key and value
KEPT_BY_DROPOUT = 0.25  # a byte for each value
# in evaluation: [B, T, D] and [B, T, n_inner] of one layer, and the logits of a chunk, as they are and as logarithms of probabilities
USED_BY_EVALUATION, USED_OF_INNER_BY_EVALUATION, LOGITS_OF_EVALUATION = 6, 3, 2
BESIDE_GRAPHS = "beside CUDA graphs"
MARGIN = "context and margin"
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
TIERS = (
    Tier("GPUs of 100 GB and more", 94 * GIB, 4, 16),
    Tier("GPUs of 40 GB and more", 38 * GIB, 6, 32),
    Tier("GPUs of 24 GB", 21.5 * GIB, 4, 8),
)
CPU_TIER = Tier("the CPU", 0, 4, 32)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a plan is for. kind: "cuda", "mps" or "cpu". memory_bytes: of each process's device, None when unknown (never for "cuda"). n_processes: of the run.

    has_bf16: of a GPU. A plan for a CPU counts fp32: there attention stays in it, whatever else is multiplied in bf16.
    """

    kind: str
    memory_bytes: int | None
    n_processes: int = 1
    has_bf16: bool = False

    def outside_gb(self) -> float:
        """What a process takes beside its tensors and their allocator."""
        return (GPU_CONTEXT_GB + NCCL_GB * (self.n_processes > 1)) if self.kind == "cuda" else PROCESS_GB

    def tier(self) -> Tier:
        if self.kind != "cuda":
            return CPU_TIER
        return next((tier for tier in TIERS if self.memory_bytes >= tier.at_least_bytes), TIERS[-1])

    def is_below_tiers(self) -> bool:
        return self.kind == "cuda" and self.memory_bytes < TIERS[-1].at_least_bytes


def hardware_of(device: torch.device, world: World) -> Hardware:
    return Hardware(device.type, memory_bytes(device, world), world.size, has_bf16(device))


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

    Raises InputError where not even one sequence fits, or nothing is left for tensors.
    """
    limits = [
        limit for limit in (config.memory_budget_gb and config.memory_budget_gb * GB, hardware.memory_bytes) if limit
    ]
    budget = min(limits, default=None)
    if budget is not None and budget <= hardware.outside_gb() * GB:
        name = (
            "of memory are too little"
            if budget == hardware.memory_bytes
            else f"(memory_budget_gb = {config.memory_budget_gb:g}) are too little"
        )
        raise InputError(
            f"{budget / GB:.1f} GB {name}: a process takes {hardware.outside_gb():.1f} GB beside its tensors"
        )

    def plan(size: int) -> Plan:
        tensors = planned_tensors(dataclasses.replace(config, micro_batch_size=size), vocab_size, hardware)
        margin = ALLOCATOR_GB * GB if hardware.kind == "cuda" else NOT_GIVEN_BACK * sum(tensors.values())
        if hardware.kind == "cuda" and config.cuda_graphs:
            tensors[BESIDE_GRAPHS] = BYTES * _beside_graphs(config, size, vocab_size, hardware.n_processes)
        return Plan(tensors | {MARGIN: hardware.outside_gb() * GB + margin}, budget, size)

    if config.micro_batch_size is not None:
        return plan(min(config.micro_batch_size, config.batch_size))
    whole = plan(config.batch_size)  # which needs no room for the gradients of micro-batches before
    if whole.fits:
        return whole
    largest = bisect.bisect_left(range(1, config.batch_size), True, key=lambda size: not plan(size).fits)
    if not largest:
        one = min(plan(1), whole, key=lambda plan: plan.total)
        raise InputError(
            f"one sequence of {config.max_seq_len} tokens takes {one.total / GB:.1f} GB with its model, and {one.budget / GB:.1f} GB are there: "
            "a smaller n_embed, n_layers, vocab_size or max_seq_len takes less"
            + (f", or raise memory_budget_gb = {config.memory_budget_gb:g}" if budget != hardware.memory_bytes else "")
        )
    n_parts = -(-config.batch_size // largest)
    return plan(-(-config.batch_size // n_parts))


def print_memory_plan(plan: Plan, config: Config, hardware: Hardware) -> None:
    """Prints the plan as a table."""
    what = (
        "each GPU"
        if hardware.kind == "cuda" and hardware.n_processes > 1
        else "the GPU"
        if hardware.kind == "cuda"
        else "each process"
    )
    n_parts = -(-config.batch_size // plan.micro_batch_size)
    print(
        f"memory of {what}, at most, with {plan.micro_batch_size} sequences of {config.max_seq_len} tokens at a time"
        + ", in bf16" * is_planned_in_bf16(config, hardware)
        + (f", {n_parts} times a step" if n_parts > 1 else "")
        + ":"
    )
    for name, size in plan.parts.items():
        if size:
            print(f"  {name:<22}{size / GB:>8.2f} GB")
    print(f"  {'in all':<22}{plan.total / GB:>8.2f} GB" + (f" of {plan.budget / GB:.1f}" if plan.budget else ""))
    if not plan.fits:
        print("warning: that is more than there is; micro_batch_size = None takes what fits")


def print_tier(given: Config, hardware: Hardware) -> None:
    """Prints what the preset made of the device. given: filled in, before the batch is settled."""
    size = f"{given.n_layers} layers, batch {given.batch_size} for each process"
    if given.preset != "auto":
        print(f'preset "{given.preset}": {size}; a constant that is set wins')
        return
    tier = hardware.tier()
    if tier.values() == {name: getattr(given, name) for name in BY_TIER}:
        print(f'preset "auto": {size}, the tier of {tier.name}; a constant that is set wins')
    else:
        print(
            f'preset "auto": {size}, as set or as in the checkpoint; the tier of {tier.name} has {tier.n_layers} layers, batch {tier.batch_size}'
        )
    if hardware.is_below_tiers():
        print(
            f"hint: a GPU of {hardware.memory_bytes / GIB:.0f} GiB is smaller than v4 is made for; mlm_pretrain_v1.py to v3 take less"
        )


def resolve_memory_plan(given: Config, config: Config, vocab_size: int, hardware: Hardware) -> Plan:
    """The plan of a run whose constants were given so and are settled so: with less of a micro-batch than is planned, where memory ran out before."""
    planned = plan_memory(dataclasses.replace(config, micro_batch_size=given.micro_batch_size), vocab_size, hardware)
    if config.micro_batch_size is not None and config.micro_batch_size < planned.micro_batch_size:
        return plan_memory(config, vocab_size, hardware)
    return planned


def apply_memory_budget(run: Run, tokens: Tokens, device: torch.device) -> None:
    """Tells the plan, settles run.config's micro-batch by it, and sets the cap. Before anything large is allocated.

    The first process plans, the others follow. Raises InputError where not even one sequence fits.
    """
    hardware = hardware_of(device, run.world)
    if run.config.preset is not None:
        print_tier(run.given, hardware)

    def plan() -> int:
        settled = resolve_memory_plan(run.given, run.config, len(tokens.token_counts), hardware)
        print_memory_plan(settled, run.config, hardware)
        return settled.micro_batch_size

    run.config = dataclasses.replace(run.config, micro_batch_size=run.world.on_rank_0("memory", plan, run.check_stop))
    cap_memory(run.config, hardware, device)


def cap_memory(config: Config, hardware: Hardware, device: torch.device) -> None:
    """Lets no tensor take the process above memory_budget_gb, where there is one and the device can be told so."""
    if config.memory_budget_gb is not None:
        limit_memory(device, (config.memory_budget_gb - hardware.outside_gb()) * GB)


def is_planned_in_bf16(config: Config, hardware: Hardware) -> bool:
    return hardware.kind != "cpu" and (config.dtype == "bfloat16" or (config.dtype == "auto" and hardware.has_bf16))


def planned_tensors(config: Config, vocab_size: int, hardware: Hardware) -> dict[str, float]:
    """Bytes of the tensors of a training step by purpose, when they take the most at once.

    One of seven moments is the fullest: the last layer's dropout; the last chunk of the loss, whose gradient grows beside the hidden states; the
    begin of the backward pass, when that gradient is there twice, as it is and scaled; the backward pass of the last layer that has all tokens; its
    end, when the word embeddings' gradient as output and as input are added up; the reduction, when all gradients are there a second time; the matrices of one
    shape in Muon's iterations.
    """
    model = shape_of(config, vocab_size)
    parameters = count_parameters(model)
    B = min(config.micro_batch_size or config.batch_size, config.batch_size)
    L, H, T, D, V = config.n_layers, config.n_heads, config.max_seq_len, config.n_embed, vocab_size
    N = B * n_slots(T, config.mlm_probability)
    C = min(chunk_rows(hardware.kind, V, D), N)
    hidden, iterations = _muon_numbers(model) if config.optimizer == "muon" else (0, 0)
    is_narrow = is_planned_in_bf16(config, hardware)
    accumulated = parameters if config.batch_size > B else 0  # the gradients of the micro-batches before
    narrow_weights = (parameters - V) / 2 * is_narrow
    dropout = KEPT_BY_DROPOUT * (2 * L + 1) * (config.dropout > 0)
    kept, of_inner = (KEPT_A_LAYER_NARROW, KEPT_OF_INNER_NARROW) if is_narrow else (KEPT_A_LAYER, KEPT_OF_INNER)
    kept_a_layer = (
        kept[model.arch] * D + of_inner[model.arch] * model.n_inner + H + 4
    )  # with attention's sums, and each norm's mean and deviation
    whole_layers = B * T * (kept_a_layer * (L - 1) + KEPT_BY_EMBEDDINGS * D + 2 + dropout * D)
    layers = whole_layers + B * T * D * KEPT_OF_ALL_TOKENS[model.arch] / (1 + is_narrow) + N * kept_a_layer
    with_head = layers + N * (KEPT_BY_HEAD * D + 2) + narrow_weights
    moments = [
        {
            "gradients": accumulated,
            "activations": layers + narrow_weights + USED_BY_DROPOUT * B * T * D * (config.dropout > 0),
        },
        {
            "gradients": accumulated + V * D + 2 * V + N * D,
            "activations": with_head,
            "logits, a chunk": C * V + 3 * C * D + V + V * D * (D <= THIN) + is_narrow * (C * V / 2 + V * D),
        },
        {"gradients": accumulated + 2 * V * D + V + 2 * N * D, "activations": with_head},
        {
            "gradients": accumulated + V * D + V + D * (10 * D + 3 * model.n_inner),
            "activations": whole_layers + narrow_weights + USED_BY_BACKWARD * B * T * D,
        },
        {
            "gradients": parameters + 2 * V * D + (V * D if accumulated else 0),
            "activations": (KEPT_BY_EMBEDDINGS + USED_AT_THE_END) * B * T * D,
        },
        {"gradients": parameters, "communication": parameters * (hardware.n_processes > 1)},
        {"gradients": parameters + hidden, "Muon's iterations": iterations},
    ]
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    numbers = {
        "weights": parameters,
        "optimizer's moments": 2 * parameters - hidden,
        "gradients": 0,
        "activations": 0,
        "logits, a chunk": 0,
        "communication": 0,
        "Muon's iterations": 0,
    } | fullest
    numbers["activations"] += 2 * (B * T + 3 * N)  # token ids, int64
    return {name: BYTES * number for name, number in numbers.items()}


def _beside_graphs(config: Config, B: int, V: int, W: int) -> int:
    """How many numbers cannot be where those of a recorded micro-batch are: gradients, which stay, Muon's, and what evaluation or communication takes."""
    model = shape_of(config, V)
    T, D, parameters = config.max_seq_len, config.n_embed, count_parameters(model)
    C = min(chunk_rows("cuda", V, D), B * n_slots(T, EVALUATION_PROBABILITY))
    evaluation = (
        B * T * (USED_BY_EVALUATION * D + USED_OF_INNER_BY_EVALUATION * model.n_inner) + LOGITS_OF_EVALUATION * C * V
    )
    return parameters + sum(_muon_numbers(model)) * (config.optimizer == "muon") + max(evaluation, parameters * (W > 1))


def _muon_numbers(model: ModelConfig) -> tuple[int, int]:
    """How many numbers the matrices have that Muon updates, and how many are there beside them and their gradients while those of one shape are iterated."""
    D, inner = model.n_embed, model.n_inner
    square, oblong = 4 * model.n_layers + 1, model.n_layers * {"bert": 2, "modern": 3}[model.arch]
    iterated = (3 * n * D * columns + 2 * n * D * D for n, columns in ((square, D), (oblong, inner)))
    return square * D * D + oblong * D * inner, max(iterated)


def planned_training_bytes(config: Config, vocab_size: int, hardware: Hardware = Hardware("cpu", None)) -> int:
    """The most that the tensors of a training step take at once."""
    return round(sum(planned_tensors(config, vocab_size, hardware).values()))
