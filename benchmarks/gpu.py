"""Throughput, utilisation and peak memory of v4's tiers and its large preset on this machine's device.

    python benchmarks/gpu.py                                  all four, as v4 runs them: bf16, compiled, CUDA graphs
    python benchmarks/gpu.py --shapes large --steps 100 --batch-size 512
    python benchmarks/gpu.py --no-torch-compile --no-cuda-graphs --dtype float32

Each shape trains on random tokens in a separate process, under v4's memory cap. The first steps, which compile and
capture, are not in the throughput; their time is printed. Utilisation is the share of the speed that a large matrix
product of the same dtype reaches here. The operations of a token are counted as
3 x [L (24 D^2 + 4 T D) + p (2 D V + 2 D^2)], where p is the share of tokens that reach the vocabulary. Peak memory is
that of PyTorch's allocator on CUDA, and of the process elsewhere; the plan beside it excludes the fixed margin.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time

import torch
from checkout import new_parser
from common import random_masked_batch, script_config

from microbert.config.constants import Config
from microbert.data.masking import n_slots
from microbert.model.build import build_model, shape_of
from microbert.runtime.device import choose_device, compute_dtype, describe_compute, describe_device, peak_memory_gb
from microbert.runtime.distributed import World
from microbert.runtime.outcome import plain_errors
from microbert.train.hardware import GB, TIERS, hardware_of
from microbert.train.memory import MARGIN, cap_memory, plan_memory
from microbert.train.step import Learner

SHAPES = {"100 GB": TIERS[0], "40 GB": TIERS[1], "24 GB": TIERS[2], "large": None}
WARM_UP = 5
MATRIX = 8192  # large enough for the full speed of a GPU; an eighth of that on a CPU


def shape_config(shape: str, flags: list[str]) -> Config:
    """Return v4's Config with a tier or the large preset, and with these flags."""
    tier = SHAPES[shape]
    flags = ["--preset", "auto" if tier else "large", *flags]
    return script_config("v4", flags, tier.values() if tier else None)


def operations_per_token(config: Config) -> float:
    L, D, T, V = config.n_layers, config.n_embed, config.max_seq_len, config.vocab_size
    share = n_slots(T, config.mlm_probability) / T
    return 3 * (L * (24 * D**2 + 4 * T * D) + share * (2 * D * V + 2 * D**2))


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_operations_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the speed of a large matrix product, the best of five."""
    n = MATRIX if device.type == "cuda" else MATRIX // 8
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        wait_for(device)
        start = time.perf_counter()
        a @ b
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def measure(config: Config, steps: int) -> dict[str, float]:
    """Train in this process and return what was measured, by name."""
    world = World.alone()
    device = choose_device(config.device, world)
    best = matmul_operations_per_second(device, compute_dtype(config, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    hardware = hardware_of(device, world)
    plan = plan_memory(config, config.vocab_size, hardware)
    config = dataclasses.replace(config, micro_batch_size=plan.micro_batch_size)
    cap_memory(config, hardware, device)
    learner = Learner(build_model(shape_of(config, config.vocab_size), config.seed).to(device), config, world)
    begin = time.perf_counter()
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            wait_for(device)
            start = time.perf_counter()
        step = learner.step(random_masked_batch(number, config), number, 1e-4)
    step.read()
    tokens = steps * config.batch_size * config.max_seq_len / (time.perf_counter() - start)
    return {
        "samples_per_second": tokens / config.max_seq_len,
        "tokens_per_second": tokens,
        "utilisation": tokens * operations_per_token(config) / best,
        "peak_gb": peak_memory_gb(device),
        "warm_up_seconds": start - begin,
    }


def measure_in_child(shape: str, steps: int, flags: list[str]) -> dict[str, float]:
    """Return what `measure` returns in a process of its own. Exits with its code if it fails."""
    command = [sys.executable, __file__, "--measure", shape, "--steps", str(steps), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


@plain_errors()
def main() -> None:
    parser = new_parser(__doc__, "Other flags are v4's: --batch-size, --dtype, --torch-compile, --device ...")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=50, help="timed steps [default: 50]")
    parser.add_argument("--measure", choices=SHAPES, help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.measure:
        print(json.dumps(measure(shape_config(arguments.measure, flags), arguments.steps)))
        return
    config = shape_config(arguments.shapes[0], flags)
    device = choose_device(config.device, World.alone())
    print(
        f"{describe_device(device, World.alone())}{describe_compute(config, device)}, torch {torch.__version__}, "
        f"{arguments.steps} steps"
    )
    print(
        f"{'shape':<8} {'batch':>11} {'samples/s':>10} {'tokens/s':>10} {'utilisation':>12} {'peak GB':>8} "
        f"{'planned':>8} {'warm-up s':>10}",
        flush=True,
    )
    for shape in arguments.shapes:
        config = shape_config(shape, flags)
        plan = plan_memory(config, config.vocab_size, hardware_of(device, World.alone()))
        planned = plan.total - (plan.parts[MARGIN] if device.type == "cuda" else 0)
        found = measure_in_child(shape, arguments.steps, flags)
        print(
            f"{shape:<8} {f'{config.batch_size} x {config.max_seq_len}':>11} {found['samples_per_second']:>10.0f} "
            f"{found['tokens_per_second']:>10.0f} {found['utilisation']:>12.1%} {found['peak_gb']:>8.2f} "
            f"{planned / GB:>8.2f} {found['warm_up_seconds']:>10.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
