"""One process and two, each with one thread on the CPU: samples a second together, and how much of the time goes into communication.

    python benchmarks/scaling.py                       v3's shape, twelve rounds
    python benchmarks/scaling.py --processes 4 --threads 2 --rounds 5

The processes speak gloo on this machine, and each takes a batch of 32 x 128 random tokens a step, so that two of them train on twice as much.
In each round they take turns: the first one trains while the others wait; all train one model together; all train, each a model of its own.
The first two give the gain; the last two give the share of communication, which is sending gradients and waiting for the slower one.
The gain that is there to be had is that of the third: processes with nothing to say to each other. Where the range of the ratios is wide, other
work shares the cores: run it again on a quiet machine.
"""

import argparse
import os
import socket
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from microbert.config.constants import Config  # noqa: E402
from microbert.config.flags import read_script  # noqa: E402
from microbert.data.batches import random_batch  # noqa: E402
from microbert.data.masking import mask_batch  # noqa: E402
from microbert.model.build import build_model  # noqa: E402
from microbert.model.layers import ModelConfig  # noqa: E402
from microbert.runtime.distributed import World  # noqa: E402
from microbert.train.step import Learner  # noqa: E402

SCRIPT = ROOT / "mlm_pretrain_v3.py"
WARM_UP = 3


def v3_config() -> Config:
    return read_script(SCRIPT, [])


class Trainee:
    """A model of v3's shape with its optimizer, shared by the processes of `world`."""

    def __init__(self, config: Config, world: World) -> None:
        model = build_model(
            ModelConfig(config.vocab_size, config.n_layers, config.n_heads, config.n_embed, config.max_seq_len),
            config.seed,
        )
        self.config, self.world, self.steps = config, world, 0
        self.learner = Learner(model, config, world)

    def train(self, steps: int) -> float:
        """Takes so many steps; returns the seconds."""
        start = time.perf_counter()
        for _ in range(steps):
            number = self.steps * self.world.size + self.world.rank
            batch = random_batch(number, self.config.vocab_size, self.config.batch_size, self.config.max_seq_len)
            masked = mask_batch(
                batch, seed=self.config.seed, probability=self.config.mlm_probability, vocab_size=self.config.vocab_size
            )
            self.learner.step(masked, self.steps, 1e-4).read()
            self.steps += 1
        return time.perf_counter() - start


def work(
    rank: int, size: int, port: int, threads: int, steps: int, rounds: int, results: torch.multiprocessing.Queue
) -> None:
    """One of the processes. The first puts the seconds of each round's three turns into `results`: one process, shared, apart."""
    torch.set_num_threads(threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    world = World({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)})
    world.meet()
    world.form_group(torch.device("cpu"), 600)
    config = v3_config()
    shared, apart = Trainee(config, world), Trainee(config, World.alone())
    shared.train(WARM_UP), apart.train(WARM_UP)
    for _ in range(rounds):
        world.gather(0.0)  # they begin together, here and below
        one = apart.train(steps) if rank == 0 else 0.0
        world.gather(0.0)
        together = shared.train(steps)
        world.gather(0.0)
        seconds = world.gather(apart.train(steps))[:, 0].mean()
        if rank == 0:
            results.put((one, together, seconds))
    world.leave_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    config, size = v3_config(), arguments.processes
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(
            target=work, args=(rank, size, port, arguments.threads, arguments.steps, arguments.rounds, results)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    lines = []
    for number in range(arguments.rounds):
        one, together, apart = (arguments.steps * config.batch_size / seconds for seconds in results.get(timeout=600))
        lines.append((one, size * together, size * together / one, size * apart / one, 1 - together / apart))
        print(
            f"round {number + 1:>2}: {lines[-1][0]:6.1f} and {lines[-1][1]:6.1f} samples/s, {lines[-1][2]:.2f} x; apart {lines[-1][3]:.2f} x",
            flush=True,
        )
    for process in processes:
        process.join()
    one, many, gain, gain_apart, share = (statistics.median(values) for values in zip(*lines))
    gains = [line[2] for line in lines]
    print(
        f"\n{os.cpu_count()} cores, torch {torch.__version__}, {config.n_layers} layers, {config.n_heads} heads, {config.n_embed}-dim, batch "
        f"{config.batch_size} x {config.max_seq_len} and {arguments.threads} thread(s) a process, medians of {arguments.rounds} rounds:"
    )
    print(
        f"1 process {one:.1f} samples/s, {size} processes {many:.1f}: {gain:.2f} x ({min(gains):.2f} to {max(gains):.2f}); without communication "
        f"{gain_apart:.2f} x; {share:.1%} of the time in communication"
    )


if __name__ == "__main__":
    main()
