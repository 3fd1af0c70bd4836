"""This project and transformers' Trainer, side by side in one run. CPU only: both sides stay on it where there is a GPU.

    pip install -r requirements-bench.txt
    python benchmarks/compare_hf.py                    all shapes, three rounds of each
    python benchmarks/compare_hf.py --shapes v1 --rounds 9

Both sides train a BERT of the same shape on the same token rows of IMDB (bundled: no network), 32 x 128 a step, padding masked,
with fused AdamW, gradient clipping and no dropout, from raw rows to updated weights: batching and masking are inside the time.
They take turns; each turn starts a new model from the same seed and leaves out the first steps. The Trainer takes more time a
step and so is timed over fewer steps, on the first of the rows, in an order of its own.

What differs is the point: BertForMaskedLM computes logits at every position, this project at the masked ones alone, in chunks.
On a CPU with units for bf16 (AMX) this project multiplies the matrices of the widest shape in it, as v4 does; `--dtype float32` tells what that gives.
What also differs, at no cost: initial output bias, Adam's betas and eps, the Trainer's falling learning rate, the masks drawn.
Prints samples/s of both (medians), and the median and range of the paired ratios. Other work on the machine falls on one side
of a pair or the other: where the range is wide, run it again on a quiet machine.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from microbert.batches import training_batch  # noqa: E402
from microbert.config import Config, read_script  # noqa: E402
from microbert.corpus import hold_cache, open_corpus  # noqa: E402
from microbert.device import compute_dtype  # noqa: E402
from microbert.distributed import World  # noqa: E402
from microbert.hugging_face import hugging_face_config  # noqa: E402
from microbert.layers import MaskedLanguageModel  # noqa: E402
from microbert.masking import mask_batch  # noqa: E402
from microbert.model import model_for_tokens  # noqa: E402
from microbert.tokenizer import PAD_ID, get_tokenizer, save_tokenizer  # noqa: E402
from microbert.prepare import prepare_tokens  # noqa: E402
from microbert.tokens import Tokens  # noqa: E402
from microbert.step import Learner  # noqa: E402

SHAPES = {  # n_layers, n_heads, n_embed, vocab_size; timed steps of this project and of the Trainer
    "v1": ((2, 2, 4, 10_000), 60, 5),
    "v2": ((4, 4, 8, 10_000), 40, 5),
    "v3": ((6, 8, 16, 10_000), 20, 4),
    "4L/8H/128D": ((4, 8, 128, 25_000), 10, 3),
}
WARM_UP = 2  # steps left out of each turn
LEARNING_RATE = 1e-4


def new_model(config: Config, tokens: Tokens) -> MaskedLanguageModel:
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its size each time
        return model_for_tokens(config, tokens)


def ours(config: Config, tokens: Tokens, steps: int) -> float:
    """Samples a second of this project's training step."""
    learner = Learner(new_model(config, tokens), config, World({}))
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = time.perf_counter()
        batch = training_batch(tokens.train, step=step, epochs=100, global_batch_size=config.batch_size, seed=config.seed)
        masked = mask_batch(batch, seed=config.seed, probability=config.mlm_probability, vocab_size=learner.model.config.vocab_size)
        learner.step(masked, step, LEARNING_RATE).read()
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
    model = transformers.BertForMaskedLM(transformers.BertConfig(**hugging_face_config(new_model(config, tokens).config)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    n_rows = min(len(tokens.train), (WARM_UP + steps) * config.batch_size)
    input_ids = torch.from_numpy(training_batch(tokens.train, step=0, epochs=100, global_batch_size=n_rows, seed=config.seed).input_ids)
    rows = [{"input_ids": row, "attention_mask": (row != PAD_ID).long()} for row in input_ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=config.batch_size, max_steps=WARM_UP + steps, learning_rate=LEARNING_RATE,
        weight_decay=config.weight_decay, max_grad_norm=config.grad_clip, optim="adamw_torch_fused", use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=config.seed)
    clock = Clock()
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock],
                                   data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=config.mlm_probability))
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    return steps * config.batch_size / (clock.end - clock.start)


def compare(name: str, rounds: int, dtype: str, folder: Path) -> str:
    (n_layers, n_heads, n_embed, vocab_size), our_steps, their_steps = SHAPES[name]
    config = dataclasses.replace(read_script(ROOT / "mlm_pretrain_v1.py", []), n_layers=n_layers, n_heads=n_heads,
                                 n_embed=n_embed, vocab_size=vocab_size, optimizer="adamw", dtype=dtype, max_samples=4000, device="cpu", cache_dir=str(folder / "cache"))
    corpus = open_corpus(config, lambda: None)
    with hold_cache(corpus, config, lambda: None):
        tokenizer = get_tokenizer(corpus, config, lambda: None)
        tokens = prepare_tokens(corpus, tokenizer, config, lambda: None)
    save_tokenizer(tokenizer, folder, config.max_seq_len)
    pairs = []
    for number in range(rounds):
        pairs.append((ours(config, tokens, our_steps), theirs(config, tokens, folder, their_steps)))
        print(f"{name}, round {number + 1}: {pairs[-1][0]:.1f} and {pairs[-1][1]:.1f} samples/s", flush=True)
    ratios = [a / b for a, b in pairs]
    products = "bf16" if compute_dtype(config, torch.device("cpu")) == torch.bfloat16 else "fp32"
    return (f"{name:12} {len(tokens.token_counts):>8,} {products:>8} {statistics.median(a for a, _ in pairs):>12.1f} "
            f"{statistics.median(b for _, b in pairs):>12.1f} {statistics.median(ratios):>8.1f} x   {min(ratios):.1f} to {max(ratios):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="of this project's matrix products, as the constant dtype")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    lines = []
    with tempfile.TemporaryDirectory() as folder:  # the shapes share what is prepared
        for name in arguments.shapes:
            lines.append(compare(name, arguments.rounds, arguments.dtype, Path(folder)))
    print(f"\n{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"batch 32 x 128, {arguments.rounds} rounds")
    print(f"{'shape':12} {'vocab':>8} {'products':>8} {'ours':>12} {'Trainer':>12} {'ratio':>10}   range  (samples/s, medians)")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
