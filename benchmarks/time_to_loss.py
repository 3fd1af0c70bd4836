"""Time from raw text to the same held-out loss: this project against transformers' Trainer, on the same cores.

    python benchmarks/time_to_loss.py                          55 minutes on an idle machine; draws time_to_loss.png
    python benchmarks/time_to_loss.py --minutes 3 --search-minutes 1     a short trial
    python benchmarks/time_to_loss.py --dtype float32                    other flags are v4's

The Trainer gets BertForMaskedLM of the same shape, this project's tokenizer, packed sequences, no dropout, and the best
of three learning rates that bracket its optimum, as found in shorter runs. This project runs v4 unchanged, for a tenth
of the time; on a CPU with bf16 units it multiplies matrices in bf16, unless `--dtype float32` is given. Both times
include the preparation, and exclude scoring. Both are scored on the same held-out masks.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Container
from pathlib import Path

import torch
import transformers
from checkout import new_parser
from common import (
    SMALL_V4,
    held_out_loss,
    machine,
    new_learner,
    prepared,
    scored_batches,
    script_config,
    take_step,
)
from hf_trainer import new_reference_model, new_trainer

from microbert.config.constants import Config
from microbert.config.learning_rate import peak_learning_rate
from microbert.data.batches import training_batch
from microbert.data.masking import MaskedBatch
from microbert.data.shards import Tokens
from microbert.data.tokenizer import save_tokenizer
from microbert.data.training_rows import training_rows
from microbert.model.loss import masked_scores
from microbert.runtime.device import describe_compute
from microbert.runtime.outcome import plain_errors
from microbert.train.schedule import learning_rate_share

RATES = (5e-4, 1e-3, 2e-3)
WARMUP_RATIO = 0.06  # of the Trainer's steps
MLM_PROBABILITY = 0.15  # of the Trainer
SCORED_BATCHES = 16  # of 32 held-out sequences
POINTS = 60  # scores in a run
TIMED_STEPS = 10  # to estimate how many steps the Trainer takes in the given time
OURS_SHARE = 0.1  # of the Trainer's time
Curve = list[tuple[float, float]]  # seconds and held-out loss


class Clock:
    """Counts seconds from the start of the preparation, without the time of scoring. prepared: seconds so far."""

    def __init__(self, prepared: float) -> None:
        self.start = time.perf_counter() - prepared
        self.curve: Curve = []

    def now(self) -> float:
        return time.perf_counter() - self.start

    def score(self, loss: Callable[[], float]) -> None:
        before = self.now()
        self.curve.append((before, loss()))
        self.start += self.now() - before


class Scores(transformers.TrainerCallback):
    """Score the model after these steps."""

    def __init__(self, clock: Clock, loss: Callable[[], float], steps: Container[int]) -> None:
        self.clock, self.loss, self.steps = clock, loss, steps

    def on_step_end(self, arguments, state, control, **_):
        if state.global_step in self.steps:
            self.clock.score(self.loss)


def prepare(folder: Path, flags: list[str]) -> tuple[Config, Tokens, float]:
    """Return v4's Config with 10K tokens and these flags, the tokens of raw IMDB, and the seconds of preparing them.

    The seconds include training the tokenizer.
    """
    config = script_config("v4", [*SMALL_V4, "--cache-dir", str(folder / "cache"), *flags])
    start = time.perf_counter()
    tokenizer, tokens = prepared(config)
    seconds = time.perf_counter() - start
    save_tokenizer(tokenizer, folder, config.max_seq_len)
    return config, tokens, seconds


def ours(config: Config, tokens: Tokens, seconds: float, minutes: float) -> Curve:
    """Train v4's recipe, with a learning rate that decays within the given time. seconds: of the preparation."""
    batches = scored_batches(config, tokens, SCORED_BATCHES)
    clock = Clock(seconds)
    learner, rows, step = new_learner(config, tokens), training_rows(tokens, config), 0
    steps = rows.steps
    clock.score(lambda: held_out_loss(learner, batches))
    while (used := (clock.now() - seconds) / (60 * minutes - seconds)) < 1 and step < steps:
        rate = peak_learning_rate(config) * learning_rate_share(max(step, used * steps), steps, config)
        take_step(learner, rows, step, rate)
        step += 1
        if used * POINTS >= len(clock.curve):
            clock.score(lambda: held_out_loss(learner, batches))
    clock.score(lambda: held_out_loss(learner, batches))
    return clock.curve


def theirs(
    config: Config, tokens: Tokens, folder: Path, seconds: float, minutes: float, rate: float, n_points: int
) -> Curve:
    """Train transformers' Trainer on packed rows, for as many steps as fit in the given time."""
    (first, _), (last, _) = run_trainer(config, tokens, folder, 0.0, TIMED_STEPS, rate, (1, TIMED_STEPS))
    steps = max(1, math.ceil((60 * minutes - seconds) * (TIMED_STEPS - 1) / (last - first)))
    scored = {*range(1, steps, math.ceil(steps / n_points)), steps}
    return run_trainer(config, tokens, folder, seconds, steps, rate, scored)


@torch.no_grad()
def reference_loss(model: transformers.BertForMaskedLM, batches: list[MaskedBatch]) -> float:
    """Return the loss of BertForMaskedLM in nats per masked token, as `held_out_loss` does for this project."""
    model.eval()
    total = 0.0
    for batch in batches:
        hidden = model.cls.predictions.transform(model.bert(torch.from_numpy(batch.input_ids)).last_hidden_state)
        hidden = hidden.take_along_dim(torch.from_numpy(batch.positions)[:, :, None], dim=1).flatten(0, 1)
        weight, bias = model.get_output_embeddings().weight, model.cls.predictions.bias
        total += masked_scores(hidden, weight, bias, torch.from_numpy(batch.labels).reshape(-1))[0]
    model.train()
    return total / sum(batch.n_masked for batch in batches)


def run_trainer(
    config: Config, tokens: Tokens, folder: Path, seconds: float, steps: int, rate: float, scored: Container[int]
) -> Curve:
    """Return the losses after the steps `scored`."""
    model = new_reference_model(dataclasses.replace(config, arch="bert"), tokens)
    batches = scored_batches(config, tokens, SCORED_BATCHES)
    n_rows = steps * config.batch_size
    packed = prepared(dataclasses.replace(config, rows="packed"))[1]
    batch = training_batch(packed.train, step=0, epochs=10_000, global_batch_size=n_rows, seed=config.seed)
    input_ids = torch.from_numpy(batch.input_ids.astype("int32"))
    rows = [{"input_ids": row.long(), "attention_mask": torch.ones_like(row)} for row in input_ids]
    clock = Clock(seconds)
    trainer = new_trainer(
        model,
        rows,
        config,
        folder,
        Scores(clock, lambda: reference_loss(model, batches), scored),
        steps,
        rate,
        MLM_PROBABILITY,
        math.ceil(WARMUP_RATIO * steps),
    )
    clock.start = time.perf_counter() - seconds  # building rows and the Trainer does not count
    trainer.train()
    return clock.curve


def best_rate(config: Config, tokens: Tokens, folder: Path, seconds: float, minutes: float) -> float:
    """Return the Trainer's learning rate with the lowest loss after short runs."""
    ends = {}
    for rate in RATES:
        ends[rate] = theirs(config, tokens, folder, seconds, minutes, rate, n_points=1)[-1][1]
        print(f"Trainer, {minutes:g} min at {rate:g}: {ends[rate]:.4f}", flush=True)
    best = min(ends, key=ends.get)
    if best in (RATES[0], RATES[-1]):
        print(f"note: the best of them, {best:g}, is at the edge")
    return best


def first_at(curve: Curve, loss: float) -> float:
    """Return the seconds at which the curve first reaches the loss; infinity if it never does."""
    return next((seconds for seconds, value in curve if value <= loss), math.inf)


def draw(curves: dict[str, Curve], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot([seconds / 60 for seconds, _ in curve], [loss for _, loss in curve], label=name)
    axes.set(xscale="log", xlabel="minutes from raw text", ylabel="held-out MLM loss (nats)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def print_curves(curves: dict[str, Curve]) -> None:
    """Print about 12 points of each curve, and the ratio of the times. The Trainer's curve comes first."""
    print(f"\n{'seconds':>9} {'loss':>8}   " + "   ".join(curves))
    for name, curve in curves.items():
        print("\n".join(f"{at:>9.1f} {loss:>8.4f}   {name}" for at, loss in curve[:: max(1, len(curve) // 12)]))
    baseline, own = curves.values()
    loss = baseline[-1][1]
    times = first_at(baseline, loss), first_at(own, loss)
    print(f"\n{machine()}, transformers {transformers.__version__}")
    print(
        f"the Trainer ends at {loss:.4f}, which it first reaches after {times[0]:.0f} s, and this project after "
        f"{times[1]:.0f} s: {times[0] / times[1]:.1f} times sooner"
    )


@plain_errors()
def main() -> None:
    parser = new_parser(__doc__, "Other flags are v4's: --dtype, --max-samples ...")
    parser.add_argument("--minutes", type=float, default=30, help="of the Trainer's run [default: 30]")
    parser.add_argument(
        "--search-minutes",
        type=float,
        default=5,
        help="of each of three runs before it, which choose the Trainer's learning rate [default: 5]",
    )
    parser.add_argument("--picture", type=Path, default=Path("time_to_loss.png"))
    arguments, flags = parser.parse_known_args()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, tokens, seconds = prepare(folder, flags)
        print(f"preparation: {seconds:.0f} s")
        rate = best_rate(config, tokens, folder, seconds, arguments.search_minutes)
        curves = {
            f"Trainer, BertForMaskedLM, {rate:g}": theirs(
                config, tokens, folder, seconds, arguments.minutes, rate, POINTS
            ),
            f"MicroBERT v4{describe_compute(config, torch.device('cpu'))}": ours(
                config, tokens, seconds, OURS_SHARE * arguments.minutes
            ),
        }
    print_curves(curves)
    draw(curves, arguments.picture)


if __name__ == "__main__":
    main()
