"""How soon this project and transformers' Trainer come to the same held-out loss, from raw text, on the same cores.

    python benchmarks/time_to_loss.py                          about 55 minutes on an otherwise idle machine; draws time_to_loss.png
    python benchmarks/time_to_loss.py --minutes 3 --search-minutes 1     to see that it works
    python benchmarks/time_to_loss.py --dtype float32                    other flags are v4's

The Trainer gets BertForMaskedLM of the same shape, this project's tokenizer, packed sequences, no dropout, and the best of three learning rates that
bracket its optimum, as found in shorter runs. This project runs v4 as it stands, for a tenth of the time; where the CPU has units for bf16,
it multiplies its matrices in that, unless `--dtype float32` is given. Both are charged with the preparation, both are scored on the same held-out
masks, and neither for the time that scoring takes.
"""

import argparse
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Container
from pathlib import Path

import torch
import transformers
from common import ROOT, held_out_loss, new_learner, new_model, prepared, scored_batches, take_step

from microbert.config.constants import Config
from microbert.config.flags import read_script
from microbert.config.learning_rate import peak_learning_rate
from microbert.data.batches import steps_in_run, training_batch
from microbert.data.shards import Tokens
from microbert.data.tokenizer import save_tokenizer
from microbert.model.hugging_face import hugging_face_config
from microbert.model.loss import masked_scores
from microbert.runtime.device import describe_compute
from microbert.runtime.run import plain_errors
from microbert.train.schedule import learning_rate_share

RATES = (5e-4, 1e-3, 2e-3)
SCORED_BATCHES = 16  # of 32 held-out sequences
POINTS = 60  # scores in a run
TIMED_STEPS = 10  # from which the Trainer's number of steps in the time is reckoned
OURS_SHARE = 0.1  # of the Trainer's time
Curve = list[tuple[float, float]]  # seconds and held-out loss


class Clock:
    """Counts from the begin of the preparation, but for the time that scoring takes."""

    def __init__(self, prepared: float) -> None:
        self.start = time.perf_counter() - prepared
        self.curve: Curve = []

    def now(self) -> float:
        return time.perf_counter() - self.start

    def score(self, loss: Callable[[], float]) -> None:
        before = self.now()
        self.curve.append((before, loss()))
        self.start += self.now() - before


def prepare(folder: Path, flags: list[str]) -> tuple[Config, Tokens, float]:
    """v4 at 10K words on raw IMDB, with these flags, and the seconds from text to tokens, the tokenizer's training included."""
    config = read_script(
        ROOT / "mlm_pretrain_v4.py",
        [
            "--vocab-size",
            "10000",
            "--n-layers",
            "4",
            "--batch-size",
            "32",
            "--device",
            "cpu",
            "--cache-dir",
            str(folder / "cache"),
            *flags,
        ],
    )
    start = time.perf_counter()
    tokenizer, tokens = prepared(config)
    seconds = time.perf_counter() - start
    save_tokenizer(tokenizer, folder, config.max_seq_len)
    return config, tokens, seconds


def ours(config: Config, tokens: Tokens, seconds: float, minutes: float) -> Curve:
    """v4's recipe, its learning rate falling in the time that is there."""
    learner, batches = new_learner(config, tokens), scored_batches(config, tokens, SCORED_BATCHES)
    clock, steps, step = Clock(seconds), steps_in_run(len(tokens.train), config.epochs, config.batch_size), 0
    clock.score(lambda: held_out_loss(learner, batches))
    while (used := (clock.now() - seconds) / (60 * minutes - seconds)) < 1 and step < steps:
        take_step(
            learner,
            tokens,
            step,
            peak_learning_rate(config) * learning_rate_share(max(step, used * steps), steps, config),
            config.epochs,
        )
        step += 1
        if used * POINTS >= len(clock.curve):
            clock.score(lambda: held_out_loss(learner, batches))
    clock.score(lambda: held_out_loss(learner, batches))
    return clock.curve


class Scores(transformers.TrainerCallback):
    def __init__(self, clock: Clock, loss: Callable[[], float], steps: Container[int]) -> None:
        self.clock, self.loss, self.steps = clock, loss, steps

    def on_step_end(self, arguments, state, control, **_):
        if state.global_step in self.steps:
            self.clock.score(self.loss)


def theirs(
    config: Config, tokens: Tokens, folder: Path, seconds: float, minutes: float, rate: float, n_points: int
) -> Curve:
    """transformers' Trainer on the same rows, with as many steps as the time takes."""
    (first, _), (last, _) = _their_run(config, tokens, folder, 0.0, TIMED_STEPS, rate, (1, TIMED_STEPS))
    steps = math.ceil((60 * minutes - seconds) * (TIMED_STEPS - 1) / (last - first))
    return _their_run(config, tokens, folder, seconds, steps, rate, {*range(1, steps, -(-steps // n_points)), steps})


def _their_run(
    config: Config, tokens: Tokens, folder: Path, seconds: float, steps: int, rate: float, scored: Container[int]
) -> Curve:
    """scored: the steps behind which it is scored."""
    transformers.set_seed(config.seed)
    shape = new_model(dataclasses.replace(config, arch="bert"), tokens).config
    model = transformers.BertForMaskedLM(transformers.BertConfig(**hugging_face_config(shape)))
    batches = scored_batches(config, tokens, SCORED_BATCHES)

    def loss() -> float:
        model.eval()
        total = 0.0
        with torch.no_grad():
            for batch in batches:
                hidden = model.cls.predictions.transform(
                    model.bert(torch.from_numpy(batch.input_ids)).last_hidden_state
                )
                hidden = hidden.take_along_dim(torch.from_numpy(batch.positions)[:, :, None], dim=1).flatten(0, 1)
                total += masked_scores(
                    hidden,
                    model.get_output_embeddings().weight,
                    model.cls.predictions.bias,
                    torch.from_numpy(batch.labels).reshape(-1),
                )[0]
        model.train()
        return total / sum(batch.n_masked for batch in batches)

    n_rows = steps * config.batch_size
    input_ids = torch.from_numpy(
        training_batch(
            tokens.train, step=0, epochs=10_000, global_batch_size=n_rows, seed=config.seed
        ).input_ids.astype("int32")
    )
    rows = [{"input_ids": row.long(), "attention_mask": torch.ones_like(row)} for row in input_ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=config.batch_size,
        max_steps=steps,
        learning_rate=rate,
        warmup_steps=math.ceil(0.06 * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.grad_clip,
        optim="adamw_torch_fused",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=config.seed,
    )
    clock = Clock(seconds)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[Scores(clock, loss, scored)],
        data_collator=transformers.DataCollatorForLanguageModeling(
            transformers.AutoTokenizer.from_pretrained(folder), mlm_probability=0.15
        ),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    clock.start = time.perf_counter() - seconds  # what was laid out for the Trainer is not its time
    trainer.train()
    return clock.curve


def first_at(curve: Curve, loss: float) -> float:
    """Seconds at which the curve first stands at the loss or below it; infinity where it never does."""
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


@plain_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Other flags are v4's: --dtype, --max-samples ..."
    )
    parser.add_argument("--minutes", type=float, default=30, help="of the Trainer's run")
    parser.add_argument(
        "--search-minutes",
        type=float,
        default=5,
        help="of each of its three runs before, which choose the learning rate",
    )
    parser.add_argument("--picture", type=Path, default=Path("time_to_loss.png"))
    arguments, flags = parser.parse_known_args()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, tokens, seconds = prepare(folder, flags)
        print(f"preparation: {seconds:.0f} s")
        ends = {}
        for rate in RATES:
            ends[rate] = theirs(config, tokens, folder, seconds, arguments.search_minutes, rate, n_points=1)[-1][1]
            print(f"Trainer, {arguments.search_minutes:g} minutes at {rate:g}: {ends[rate]:.4f}", flush=True)
        rate = min(ends, key=ends.get)
        if rate in (RATES[0], RATES[-1]):
            print(f"note: the best of them, {rate:g}, is at the edge")
        curves = {
            f"Trainer, BertForMaskedLM, {rate:g}": theirs(
                config, tokens, folder, seconds, arguments.minutes, rate, POINTS
            ),
            f"MicroBERT v4{describe_compute(config, torch.device('cpu'))}": ours(
                config, tokens, seconds, OURS_SHARE * arguments.minutes
            ),
        }
    baseline, own = curves.values()
    print(f"\n{'seconds':>9} {'loss':>8}   " + "   ".join(curves))
    for name, curve in curves.items():
        print("\n".join(f"{at:>9.1f} {loss:>8.4f}   {name}" for at, loss in curve[:: max(1, len(curve) // 12)]))
    loss = baseline[-1][1]
    times = first_at(baseline, loss), first_at(own, loss)
    print(
        f"\n{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(
        f"the Trainer ends at {loss:.4f}, where it first stands after {times[0]:.0f} s, and this project after {times[1]:.0f} s: {times[0] / times[1]:.1f} times sooner"
    )
    draw(curves, arguments.picture)


if __name__ == "__main__":
    main()
