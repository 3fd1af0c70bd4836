"""Held-out loss against the learning rate, at the shapes of v1 to v4, and what the package's rule chooses.

    python benchmarks/learning_rate.py                                 all four: hours; draws learning_rate.png
    python benchmarks/learning_rate.py --scripts v1 v2 --seeds 42 43
    python benchmarks/learning_rate.py --max-steps 1000                shorter runs, each with its whole schedule

Runs of one shape differ only in the peak: the rule's, times each factor. v4 has a vocabulary of 10K, like the others.
The loss is that of 1,024 held-out sequences (or of all, if there are fewer) at the end of the run.
"""

import dataclasses
import math
import statistics
import time
from pathlib import Path

from checkout import new_parser
from common import SMALL_V4, held_out_loss, new_learner, prepared, scored_batches, script_config, take_step

from microbert.config.constants import Config
from microbert.config.learning_rate import peak_learning_rate
from microbert.data.shards import Tokens
from microbert.data.training_rows import training_rows
from microbert.errors import Diverged
from microbert.runtime.outcome import plain_errors
from microbert.train.schedule import learning_rate_share

FLAGS = {"v1": (), "v2": (), "v3": (), "v4": SMALL_V4}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
SCORED_BATCHES = 32
NEAR_BEST = 0.03  # nats; drawn as a band above the lowest loss


def loss_at(config: Config, tokens: Tokens, max_steps: int | None) -> float:
    """Return the held-out loss after a run with `learning_rate` as its peak; infinity if it diverges."""
    learner = new_learner(config, tokens)
    rows = training_rows(tokens, config)
    steps = min(rows.steps, max_steps or 10**9)
    try:
        for number in range(steps):
            rate = config.learning_rate * learning_rate_share(number, steps, config)
            take_step(learner, rows, number, rate)
    except Diverged:
        return math.inf
    return held_out_loss(learner, scored_batches(config, tokens, SCORED_BATCHES))


def sweep(
    name: str, config: Config, factors: list[float], seeds: list[int], max_steps: int | None
) -> dict[float, float]:
    """Return the mean loss over the seeds, by peak learning rate."""
    rule, losses = peak_learning_rate(config), {}
    for factor in factors:
        peak, start = factor * rule, time.perf_counter()
        of_runs = [dataclasses.replace(config, seed=seed, learning_rate=peak, lr_scaling="none") for seed in seeds]
        of_seeds = [loss_at(of_run, prepared(of_run)[1], max_steps) for of_run in of_runs]
        losses[peak] = statistics.mean(of_seeds)
        print(
            f"{name} at {factor:g} x the rule, {peak:.3g}: {losses[peak]:.4f}   "
            f"{' '.join(f'{loss:.4f}' for loss in of_seeds)}   ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    return losses


def draw(losses: dict[str, dict[float, float]], rules: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(losses), 3.4), layout="constrained")
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for axes, (name, of_script) in zip(panels, losses.items(), strict=True):
        best = min(of_script.values())
        axes.plot(list(of_script), list(of_script.values()), marker="o")
        axes.axvline(rules[name], color="gray", linestyle="--", label=f"the rule: {rules[name]:.2g}")
        axes.axhspan(best, best + NEAR_BEST, color="tab:green", alpha=0.2, label=f"{NEAR_BEST} nats from the best")
        axes.set(xscale="log", xlabel="peak learning rate", title=name)
        axes.set_xticks(list(of_script), [f"{peak:.2g}" for peak in of_script])
        axes.minorticks_off()
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out MLM loss (nats)")
    figure.savefig(path, dpi=110)


@plain_errors()
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--scripts", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, help="multiples of the rule's peak")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="one run per seed; the loss is their mean")
    parser.add_argument("--max-steps", type=int, help="of each run [default: all epochs]")
    parser.add_argument("--cache-dir", default="cache")
    parser.add_argument("--picture", type=Path, default=Path("learning_rate.png"))
    arguments = parser.parse_args()
    losses, rules = {}, {}
    for name in arguments.scripts:
        config = script_config(name, [*FLAGS[name], "--device", "cpu", "--cache-dir", arguments.cache_dir])
        rules[name] = peak_learning_rate(config)
        losses[name] = sweep(name, config, arguments.factors, arguments.seeds, arguments.max_steps)
    for name, of_script in losses.items():
        best = min(of_script, key=of_script.get)
        rule = f"the rule's peak, {rules[name]:.3g}, is not among those tried"
        if rules[name] in of_script:
            rule = f"at the rule's peak, {rules[name]:.3g}, it is {of_script[rules[name]] - of_script[best]:.4f} higher"
        print(f"{name}: the lowest loss is {of_script[best]:.4f}, at {best:.3g}; {rule}")
    draw(losses, rules, arguments.picture)


if __name__ == "__main__":
    main()
