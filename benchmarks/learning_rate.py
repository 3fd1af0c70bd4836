"""How a run's held-out loss depends on its learning rate, at the shapes of v1 to v4, and where the rule of config.py stands in that.

    python benchmarks/learning_rate.py                                 all four, with their constants as they stand: hours; draws learning_rate.png
    python benchmarks/learning_rate.py --scripts v1 v2 --seeds 42 43
    python benchmarks/learning_rate.py --max-steps 1000                shorter runs, each with its whole schedule

Runs of one shape differ in nothing but the peak, which is the rule's times each factor. v4 trains with a vocabulary of 10K, like the others.
The loss is that of 1,024 held-out sequences (of all, where there are fewer) at the end of the run.
"""

import argparse
import dataclasses
import math
import statistics
import time
from pathlib import Path

from common import ROOT, held_out_loss, new_learner, prepared, scored_batches, take_step

from microbert.config.constants import Config
from microbert.config.flags import read_script
from microbert.config.learning_rate import peak_learning_rate
from microbert.data.batches import steps_in_run
from microbert.data.shards import Tokens
from microbert.errors import Diverged
from microbert.runtime.run import plain_errors
from microbert.train.schedule import learning_rate_share

FLAGS = {"v1": [], "v2": [], "v3": [], "v4": ["--vocab-size", "10000", "--n-layers", "4", "--batch-size", "32"]}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
SCORED_BATCHES = 32


def loss_at(config: Config, tokens: Tokens, max_steps: int | None) -> float:
    """Infinity where the run diverges."""
    learner = new_learner(config, tokens)
    steps = min(steps_in_run(len(tokens.train), config.epochs, config.batch_size), max_steps or 10**9)
    try:
        for number in range(steps):
            take_step(
                learner,
                tokens,
                number,
                config.learning_rate * learning_rate_share(number, steps, config),
                config.epochs,
            )
    except Diverged:
        return math.inf
    return held_out_loss(learner, scored_batches(config, tokens, SCORED_BATCHES))


def draw(losses: dict[str, dict[float, float]], rules: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(losses), 3.4), layout="constrained")
    for axes, (name, of_script) in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses.items()):
        axes.plot(list(of_script), list(of_script.values()), marker="o")
        axes.axvline(rules[name], color="gray", linestyle="--", label=f"the rule: {rules[name]:.2g}")
        axes.axhspan(
            min(of_script.values()),
            min(of_script.values()) + 0.03,
            color="tab:green",
            alpha=0.2,
            label="0.03 nats from the best",
        )
        axes.set(xscale="log", xlabel="peak learning rate", title=name)
        axes.set_xticks(list(of_script), [f"{peak:.2g}" for peak in of_script])
        axes.minorticks_off()
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out MLM loss (nats)")
    figure.savefig(path, dpi=110)


@plain_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, help="of the rule's peak")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="runs of which the mean is taken")
    parser.add_argument("--max-steps", type=int, help="of each run; all of its epochs, unless given")
    parser.add_argument("--cache-dir", default="cache")
    parser.add_argument("--picture", type=Path, default=Path("learning_rate.png"))
    arguments = parser.parse_args()
    losses, rules = {}, {}
    for name in arguments.scripts:
        config = read_script(
            ROOT / f"mlm_pretrain_{name}.py", [*FLAGS[name], "--device", "cpu", "--cache-dir", arguments.cache_dir]
        )
        rules[name], losses[name] = peak_learning_rate(config), {}
        for factor in arguments.factors:
            peak, of_seeds, start = factor * rules[name], [], time.perf_counter()
            for seed in arguments.seeds:
                of_run = dataclasses.replace(config, seed=seed, learning_rate=peak, lr_scaling="none")
                of_seeds.append(loss_at(of_run, prepared(of_run)[1], arguments.max_steps))
            losses[name][peak] = statistics.mean(of_seeds)
            print(
                f"{name} at {factor:g} x the rule, {peak:.3g}: {losses[name][peak]:.4f}   {' '.join(f'{loss:.4f}' for loss in of_seeds)}   "
                f"({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
    for name, of_script in losses.items():
        best = min(of_script, key=of_script.get)
        told = (
            f"{of_script[rules[name]] - of_script[best]:.4f} above"
            if rules[name] in of_script
            else "not among them, above"
        )
        print(f"{name}: best at {best:.3g} with {of_script[best]:.4f}; the rule's {rules[name]:.3g} stands {told} it")
    draw(losses, rules, arguments.picture)


if __name__ == "__main__":
    main()
