"""This project and transformers' Trainer, side by side in one run. CPU only: both sides stay on it where there is a GPU.

    pip install -r requirements-bench.txt
    python benchmarks/compare_hf.py                    all shapes, three rounds of each
    python benchmarks/compare_hf.py --shapes v1 --rounds 9

Both sides train a BERT of the same shape on the same token rows of IMDB (bundled: no network), 32 x 128 a step, padding masked,
with fused AdamW, gradient clipping and no dropout, from raw rows to updated weights: batching and masking are inside the time.
They take turns; each turn starts a new model from the same seed and leaves out the first steps. The Trainer takes more time a
step and so is timed over fewer steps, on the first of the rows, in an order of its own.

What differs is the point: BertForMaskedLM computes logits at every position, this project at the masked ones alone, in chunks.
On a CPU with units for bf16 this project multiplies the matrices of the widest shape in it, as v4 does; `--dtype float32` tells what that gives.
What also differs, at no cost: initial output bias, Adam's betas and eps, the Trainer's falling learning rate, the masks drawn.
Prints samples/s of both (medians), and the median and range of the paired ratios. Other work on the machine falls on one side
of a pair or the other: where the range is wide, run it again on a quiet machine.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from common import ROOT, new_learner, new_model, prepared, take_step

from microbert.config.constants import Config
from microbert.config.flags import read_script
from microbert.data.batches import training_batch
from microbert.data.shards import Tokens
from microbert.data.tokenizer import PAD_ID, save_tokenizer
from microbert.model.hugging_face import hugging_face_config
from microbert.runtime.device import compute_dtype
from microbert.runtime.outcome import plain_errors

SHAPES = {  # n_layers, n_heads, n_embed, vocab_size; timed steps of this project and of the Trainer
    "v1": ((2, 2, 4, 10_000), 60, 5),
    "v2": ((4, 4, 8, 10_000), 40, 5),
    "v3": ((6, 8, 16, 10_000), 20, 4),
    "4L/8H/128D": ((4, 8, 128, 25_000), 10, 3),
}
WARM_UP = 2  # steps left out of each turn
LEARNING_RATE = 1e-4


def ours(config: Config, tokens: Tokens, steps: int) -> float:
    """Samples a second of this project's training step."""
    learner = new_learner(config, tokens)
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = time.perf_counter()
        take_step(learner, tokens, step, LEARNING_RATE, epochs=100)
    return steps * config.batch_size / (time.perf_counter() - start)


class Clock(transformers.TrainerCallback):
    """Notes when the warm-up and the last step ended."""

    def on_step_end(self, arguments, state, control, **_):
        if state.global_step == WARM_UP:
            self.start = time.perf_counter()
        self.end = time.perf_counter()


def theirs(config: Config, tokens: Tokens, folder: Path, steps: int) -> float:
    """Samples a second of transformers' Trainer, on the same shape and rows."""
    transformers.set_seed(config.seed)
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(**hugging_face_config(new_model(config, tokens).config))
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    n_rows = min(len(tokens.train), (WARM_UP + steps) * config.batch_size)
    input_ids = torch.from_numpy(
        training_batch(tokens.train, step=0, epochs=100, global_batch_size=n_rows, seed=config.seed).input_ids
    )
    rows = [{"input_ids": row, "attention_mask": (row != PAD_ID).long()} for row in input_ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=config.batch_size,
        max_steps=WARM_UP + steps,
        learning_rate=LEARNING_RATE,
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
    clock = Clock()
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[clock],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=config.mlm_probability),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    return steps * config.batch_size / (clock.end - clock.start)


def compare(name: str, rounds: int, dtype: str, folder: Path) -> str:
    (n_layers, n_heads, n_embed, vocab_size), our_steps, their_steps = SHAPES[name]
    config = dataclasses.replace(
        read_script(ROOT / "mlm_pretrain_v1.py", []),
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
    ratios = [a / b for a, b in pairs]
    products = "bf16" if compute_dtype(config, torch.device("cpu")) == torch.bfloat16 else "fp32"
    return (
        f"{name:12} {len(tokens.token_counts):>8,} {products:>8} {statistics.median(a for a, _ in pairs):>12.1f} "
        f"{statistics.median(b for _, b in pairs):>12.1f} {statistics.median(ratios):>8.1f} x   {min(ratios):.1f} to {max(ratios):.1f}"
    )


@plain_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32"),
        default="auto",
        help="of this project's matrix products, as the constant dtype",
    )
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    lines = []
    with tempfile.TemporaryDirectory() as folder:  # the shapes share what is prepared
        for name in arguments.shapes:
            lines.append(compare(name, arguments.rounds, arguments.dtype, Path(folder)))
    print(
        f"\n{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"batch 32 x 128, {arguments.rounds} rounds"
    )
    print(
        f"{'shape':12} {'vocab':>8} {'products':>8} {'ours':>12} {'Trainer':>12} {'ratio':>10}   range  (samples/s, medians)"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
