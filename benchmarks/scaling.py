"""Speed-up from one process to two, each with one CPU thread, and the share of time spent on communication.

    python benchmarks/scaling.py                       v3's shape, twelve rounds
    python benchmarks/scaling.py --processes 4 --threads 2 --rounds 5

The processes use gloo on this machine. Each trains on a batch of 32 x 128 random tokens per step, so two processes
train on twice as much. Each round has three turns: the first process trains while the others wait; all train one model
together; each trains a model of its own. The first two give the speed-up. The last two give the share of communication:
sending gradients and waiting for the slowest process. The third turn gives the largest possible speed-up. If the range
of the ratios is wide, other work shares the cores: repeat on a quiet machine.
"""

import os
import socket
import statistics
import time

import torch
from checkout import new_parser
from common import median_and_range, random_masked_batch, script_config

from microbert.config.constants import Config
from microbert.model.build import build_model, shape_of
from microbert.runtime.distributed import World
from microbert.train.step import Learner

WARM_UP = 3  # steps before the first round
RESULT_SECONDS = 600  # for one round


class Trainee:
    """A model of v3's shape with its optimizer, shared by the processes of `world`."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.steps = config, world, 0
        self.learner = Learner(build_model(shape_of(config, config.vocab_size), config.seed), config, world)

    def train(self, steps: int) -> float:
        """Take this many steps. Returns the seconds."""
        start = time.perf_counter()
        for _ in range(steps):
            masked = random_masked_batch(self.steps * self.world.size + self.world.rank, self.config)
            self.learner.step(masked, self.steps, 1e-4).read()
            self.steps += 1
        return time.perf_counter() - start


def work(
    rank: int, size: int, port: int, threads: int, steps: int, rounds: int, results: torch.multiprocessing.Queue
) -> None:
    """Run one of the processes. The first puts the seconds of each round's three turns into `results`."""
    torch.set_num_threads(threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    world = World({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)})
    world.meet()
    world.form_group(torch.device("cpu"), 600)
    config = script_config("v3")
    shared, separate = Trainee(config, world), Trainee(config, World.alone())
    shared.train(WARM_UP), separate.train(WARM_UP)
    for _ in range(rounds):
        world.gather(0.0)  # a barrier, here and below
        one = separate.train(steps) if rank == 0 else 0.0
        world.gather(0.0)
        together = shared.train(steps)
        world.gather(0.0)
        seconds = world.gather(separate.train(steps))[:, 0].mean()
        if rank == 0:
            results.put((one, together, seconds))
    world.leave_group()


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    config, size = script_config("v3"), arguments.processes
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = (size, port, arguments.threads, arguments.steps, arguments.rounds, results)
    processes = [context.Process(target=work, args=(rank, *shared)) for rank in range(size)]
    for process in processes:
        process.start()
    lines = []
    for number in range(arguments.rounds):
        one, together, separate = (
            arguments.steps * config.batch_size / seconds for seconds in results.get(timeout=RESULT_SECONDS)
        )
        lines.append((one, size * together, size * together / one, size * separate / one, 1 - together / separate))
        print(
            f"round {number + 1:>2}: {one:6.1f} and {size * together:6.1f} samples/s, {lines[-1][2]:.2f} x; "
            f"separate models {lines[-1][3]:.2f} x",
            flush=True,
        )
    for process in processes:
        process.join()
    one, many, _, separate, share = (statistics.median(values) for values in zip(*lines, strict=True))
    print(
        f"\n{os.cpu_count()} cores, torch {torch.__version__}, {config.n_layers} layers, {config.n_heads} heads, "
        f"{config.n_embed}-dim, batch {config.batch_size} x {config.max_seq_len} and {arguments.threads} thread(s) "
        f"per process, medians of {arguments.rounds} rounds:"
    )
    print(
        f"1 process {one:.1f} samples/s, {size} processes {many:.1f}: "
        f"{median_and_range([line[2] for line in lines], 2)}; without communication {separate:.2f} x; "
        f"{share:.1%} of the time in communication"
    )


if __name__ == "__main__":
    main()
