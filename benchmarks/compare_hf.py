"""Training speed of this project and of transformers' Trainer, side by side on the CPU.

    pip install -r requirements-bench.txt
    python benchmarks/compare_hf.py                    all shapes, three rounds of each
    python benchmarks/compare_hf.py --shapes v1 --rounds 9

Both sides train a BERT of the same shape on the same token rows of IMDB (bundled: no network), 32 x 128 per step, with
masked padding, fused AdamW, gradient clipping and no dropout. The time covers everything from raw rows to updated
weights, batching and masking included. The sides take turns. Each turn starts a new model from the same seed, and its
first steps are not timed. The Trainer's steps take longer, so fewer of them are timed, on the first of the rows, in an
order of its own.

The difference that matters: BertForMaskedLM computes logits at every position, this project only at the masked ones, in
chunks. On a CPU with bf16 units, this project multiplies the matrices of the widest shape in bf16, as v4 does;
`--dtype float32` shows the gain. Differences without a cost: initial output bias, Adam's betas and eps, the Trainer's
decaying learning rate, the masks.
Prints samples/s of both (medians), and the median and range of the paired ratios. Other work on the machine slows one
side of a pair: if the range is wide, repeat on a quiet machine.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from checkout import new_parser
from common import machine, median_and_range, new_learner, prepared, script_config, take_step
from hf_trainer import new_reference_model, new_trainer

from microbert.config.constants import Config
from microbert.data.batches import training_batch
from microbert.data.shards import Tokens
from microbert.data.tokenizer import PAD_ID, save_tokenizer
from microbert.data.training_rows import training_rows
from microbert.runtime.device import compute_dtype
from microbert.runtime.outcome import plain_errors

SHAPES = {  # n_layers, n_heads, n_embed, vocab_size; timed steps of this project and of the Trainer
    "v1": ((2, 2, 4, 10_000), 60, 5),
    "v2": ((4, 4, 8, 10_000), 40, 5),
    "v3": ((6, 8, 16, 10_000), 20, 4),
    "4L/8H/128D": ((4, 8, 128, 25_000), 10, 3),
}
WARM_UP = 2  # steps of each turn that are not timed
LEARNING_RATE = 1e-4


def ours(config: Config, tokens: Tokens, steps: int) -> float:
    """Return the samples per second of this project's training step."""
    learner, rows = new_learner(config, tokens), training_rows(tokens, dataclasses.replace(config, epochs=100))
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = time.perf_counter()
        take_step(learner, rows, step, LEARNING_RATE)
    return steps * config.batch_size / (time.perf_counter() - start)


class Clock(transformers.TrainerCallback):
    """Record when the warm-up and the last step end."""

    def on_step_end(self, arguments, state, control, **_):
        if state.global_step == WARM_UP:
            self.start = time.perf_counter()
        self.end = time.perf_counter()


def theirs(config: Config, tokens: Tokens, folder: Path, steps: int) -> float:
    """Return the samples per second of transformers' Trainer on the same shape and rows."""
    model, clock = new_reference_model(config, tokens), Clock()
    n_rows = min(len(tokens.train), (WARM_UP + steps) * config.batch_size)
    input_ids = torch.from_numpy(
        training_batch(tokens.train, step=0, epochs=100, global_batch_size=n_rows, seed=config.seed).input_ids
    )
    rows = [{"input_ids": row, "attention_mask": (row != PAD_ID).long()} for row in input_ids]
    new_trainer(model, rows, config, folder, clock, WARM_UP + steps, LEARNING_RATE, config.mlm_probability).train()
    return steps * config.batch_size / (clock.end - clock.start)


def compare(name: str, rounds: int, dtype: str, folder: Path) -> str:
    """Return one row of the table."""
    (n_layers, n_heads, n_embed, vocab_size), our_steps, their_steps = SHAPES[name]
    config = dataclasses.replace(
        script_config("v1"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_embed=n_embed,
        vocab_size=vocab_size,
        optimizer="adamw",
        dtype=dtype,
        max_samples=4000,
        device="cpu",
        cache_dir=str(folder / "cache"),
    )
    tokenizer, tokens = prepared(config)
    save_tokenizer(tokenizer, folder, config.max_seq_len)
    pairs = []
    for number in range(rounds):
        pairs.append((ours(config, tokens, our_steps), theirs(config, tokens, folder, their_steps)))
        print(f"{name}, round {number + 1}: {pairs[-1][0]:.1f} and {pairs[-1][1]:.1f} samples/s", flush=True)
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    products = "bf16" if compute_dtype(config, torch.device("cpu")) == torch.bfloat16 else "fp32"
    return (
        f"{name:12} {len(tokens.token_counts):>8,} {products:>8} {medians[0]:>12.1f} {medians[1]:>12.1f}   "
        f"{median_and_range([a / b for a, b in pairs])}"
    )


@plain_errors()
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side [default: 3]")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32"),
        default="auto",
        help="dtype of this project's matrix products, as the constant dtype [default: auto]",
    )
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:  # the shapes share one cache
        lines = [compare(name, arguments.rounds, arguments.dtype, Path(folder)) for name in arguments.shapes]
    print(
        f"\n{machine()}, transformers {transformers.__version__}, batch 32 x 128, {arguments.rounds} rounds; "
        "medians in samples/s"
    )
    print(f"{'shape':12} {'vocab':>8} {'products':>8} {'ours':>12} {'Trainer':>12}   ratio (range)")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
