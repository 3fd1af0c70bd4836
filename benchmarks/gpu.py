"""Throughput, utilisation and peak memory of v4's tiers and its large preset on this machine's device, in one command.

    python benchmarks/gpu.py                                  all four, as v4 runs them: bf16, compiled, and played back on CUDA
    python benchmarks/gpu.py --shapes large --steps 100 --batch-size 512
    python benchmarks/gpu.py --no-torch-compile --no-cuda-graphs --dtype float32

Each shape trains on random tokens in a process of its own, under v4's cap, and leaves out its first steps (and with them compilation and recording, whose
time is told). Utilisation is the share of the speed that a large matrix product in the same dtype reaches here; its operations are counted as
3 x [L (24 D^2 + 4 T D) + p (2 D V + 2 D^2)] a token, p being the share of tokens that reach the vocabulary. Peak memory is PyTorch's
allocator's on CUDA (and the process's elsewhere), beside what was planned without the fixed margin.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from microbert.config.constants import Config, fill_in  # noqa: E402
from microbert.config.flags import read_script  # noqa: E402
from microbert.data.batches import random_batch  # noqa: E402
from microbert.data.masking import mask_batch, n_slots  # noqa: E402
from microbert.model.build import build_model, shape_of  # noqa: E402
from microbert.runtime.device import choose_device, compute_dtype, describe_compute, describe_device, peak_memory_gb  # noqa: E402
from microbert.runtime.distributed import World  # noqa: E402
from microbert.runtime.run import plain_errors  # noqa: E402
from microbert.train.hardware import GB, TIERS, hardware_of  # noqa: E402
from microbert.train.memory import MARGIN, cap_memory, plan_memory  # noqa: E402
from microbert.train.step import Learner  # noqa: E402

SCRIPT = ROOT / "mlm_pretrain_v4.py"
SHAPES = {"100 GB": TIERS[0], "40 GB": TIERS[1], "24 GB": TIERS[2], "large": None}
WARM_UP = 5
MATRIX = 8192  # wide enough that a GPU is at its best; a CPU gets a smaller one


def settle(shape: str, flags: list[str]) -> Config:
    """v4's constants, on its tier or with its preset, and with these flags."""
    tier = SHAPES[shape]
    config = read_script(SCRIPT, ["--preset", "auto" if tier else "large", *flags])
    return fill_in(config, tier.values()) if tier else config


def operations_a_token(config: Config) -> float:
    L, D, T, V = config.n_layers, config.n_embed, config.max_seq_len, config.vocab_size
    share = n_slots(T, config.mlm_probability) / T
    return 3 * (L * (24 * D**2 + 4 * T * D) + share * (2 * D * V + 2 * D**2))


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations_a_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of a large matrix product, the best of five."""
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
    """Trains in this process."""
    world = World({})
    device = choose_device(config.device, world)
    best = operations_a_second(device, compute_dtype(config, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    config = dataclasses.replace(
        config, micro_batch_size=plan_memory(config, config.vocab_size, hardware_of(device, world)).micro_batch_size
    )
    cap_memory(config, hardware_of(device, world), device)
    learner = Learner(build_model(shape_of(config, config.vocab_size), config.seed).to(device), config, world)
    begin = time.perf_counter()
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            wait_for(device)
            start = time.perf_counter()
        batch = random_batch(number, config.vocab_size, config.batch_size, config.max_seq_len)
        masked = mask_batch(batch, seed=config.seed, probability=config.mlm_probability, vocab_size=config.vocab_size)
        step = learner.step(masked, number, 1e-4)
    step.read()
    tokens = steps * config.batch_size * config.max_seq_len / (time.perf_counter() - start)
    return {
        "samples_per_second": tokens / config.max_seq_len,
        "tokens_per_second": tokens,
        "utilisation": tokens * operations_a_token(config) / best,
        "peak_gb": peak_memory_gb(device),
        "warm_up_seconds": start - begin,
    }


@plain_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Other flags are v4's: --batch-size, --dtype, --torch-compile, --device ...",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=50, help="timed ones")
    parser.add_argument("--measure", choices=SHAPES, help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.measure:
        print(json.dumps(measure(settle(arguments.measure, flags), arguments.steps)))
        return
    config = settle(arguments.shapes[0], flags)
    device = choose_device(config.device, World({}))
    print(
        f"{describe_device(device, World({}))}{describe_compute(config, device)}, torch {torch.__version__}, {arguments.steps} steps"
    )
    print(
        f"{'shape':<8} {'batch':>11} {'samples/s':>10} {'tokens/s':>10} {'utilisation':>12} {'peak GB':>8} {'planned':>8} {'warm-up s':>10}",
        flush=True,
    )
    for shape in arguments.shapes:
        config, hardware = settle(shape, flags), hardware_of(device, World({}))
        plan = plan_memory(config, config.vocab_size, hardware)
        planned = plan.total - (plan.parts[MARGIN] if device.type == "cuda" else 0)
        done = subprocess.run(
            [sys.executable, __file__, "--measure", shape, "--steps", str(arguments.steps), *flags],
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.returncode)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{shape:<8} {f'{config.batch_size} x {config.max_seq_len}':>11} {found['samples_per_second']:>10.0f} {found['tokens_per_second']:>10.0f} "
            f"{found['utilisation']:>12.1%} {found['peak_gb']:>8.2f} {planned / GB:>8.2f} {found['warm_up_seconds']:>10.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
