"""The training loop and the evaluation.

Shapes: B sequences of a batch, T = max_seq_len, M masked slots a sequence.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .batches import evaluation_batches, steps_in_run, training_batch
from .checkpoint import State, load_checkpoint, save_checkpoint
from .config import Config, explain_learning_rate, peak_learning_rate
from .counter_rng import random_bits
from .distributed import describe_device, peak_memory_gb
from .loss import masked_loss, masked_scores
from .masking import MaskedBatch, mask_batch
from .model import Bert, unigram_entropy
from .optim import build_optimizer, learning_rate_share, reach
from .report import Metrics, draw_training_curve, progress_bar
from .run import Diverged, Run
from .tokenizer import PAD_ID
from .tokens import Sequences, Tokens

EVALUATION_PROBABILITY = 0.15  # whatever the run trains with, so that losses compare
LINES_PER_RUN = 100  # of training metrics
TOO_SHORT_A_REACH = 0.1  # sum of the learning rates: v1's shape stays at unigram entropy at 0.05, and learns at 0.5
HUGS_UNIGRAM = 0.05  # nats
POINTS_PER_RUN = 10  # evaluations and checkpoints, where eval_every and save_every are None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss: nats a masked token. accuracy: the share of masked tokens guessed right."""

    loss: float
    accuracy: float


def train(run: Run, checkpoint: Path | None, model: Bert, tokens: Tokens, tokenizer: Tokenizer) -> State:
    """Trains from the checkpoint (from scratch when None) to the last step, and returns where the run stands then.

    Raises Stopped after a signal, with everything saved, and Diverged when loss or gradient stop being finite, before that
    step is applied.
    """
    config, device = run.config, next(model.parameters()).device
    steps = steps_in_run(len(tokens.train), config.epochs, config.batch_size)
    uniform_loss, unigram_loss = math.log(model.config.vocab_size), unigram_entropy(torch.from_numpy(tokens.token_counts))
    _announce(config, device, steps, uniform_loss, unigram_loss)
    eval_every = config.eval_every or -(-steps // POINTS_PER_RUN)
    save_every = config.save_every or -(-steps // POINTS_PER_RUN)
    log_every = max(1, steps // LINES_PER_RUN)
    peak = peak_learning_rate(config)
    optimizer = build_optimizer(model, config)
    state = State(tokens.key) if checkpoint is None else load_checkpoint(checkpoint, model, optimizer, tokens.key)
    if checkpoint is not None:
        print(f"going on after step {state.step}, from {checkpoint}")
    metrics = Metrics(run.folder, state.step)
    seconds_before, start = state.seconds, time.perf_counter()
    logged_step, step_seconds = state.step, 0.0

    def line(**values: float) -> dict[str, float]:
        state.seconds = seconds_before + time.perf_counter() - start
        n_sequences = min(state.step * config.batch_size, len(tokens.train) * config.epochs)
        return {"step": state.step, "epoch": round(n_sequences / len(tokens.train), 4), "tokens": n_sequences * config.max_seq_len,
                "seconds": round(state.seconds, 3), **values}

    def evaluate_if_due() -> None:
        due = state.step % eval_every == 0 or state.step == steps
        if not due or metrics.has_evaluation(state.step):
            return
        result = evaluate(model, tokens.held_out, config, run)
        if result is None:
            return
        if result.loss < state.best_eval_loss:
            state.best_eval_loss, state.best_step = result.loss, state.step
        state.last_eval_loss, state.last_eval_accuracy = result.loss, result.accuracy
        metrics.write(line(**{"eval/loss": result.loss, "eval/accuracy": result.accuracy}))
        bar.write(f"step {state.step:>6}/{steps}  held-out loss {result.loss:.4f}  accuracy {result.accuracy:.1%}")

    def stop_if_asked() -> None:
        if run.stop_signal:
            line()
            save_checkpoint(run, state, model, optimizer, tokenizer)
            bar.close()
            run.check_stop()

    with progress_bar(steps, state.step, "training", " steps") as bar:
        evaluate_if_due()
        stop_if_asked()
        while state.step < steps:
            step_start = time.perf_counter()
            batch = training_batch(tokens.train, step=state.step, epochs=config.epochs, global_batch_size=config.batch_size, seed=config.seed)
            masked = mask_batch(batch, seed=config.seed, probability=config.mlm_probability, vocab_size=tokenizer.get_vocab_size())
            learning_rate = peak * learning_rate_share(state.step, steps, config.warmup_ratio)
            loss, grad_norm = training_step(model, optimizer, masked, config, state.step, learning_rate)
            step_seconds += time.perf_counter() - step_start
            state.step += 1
            state.loss_sum += loss
            state.loss_steps += 1
            bar.update(1)
            if state.step % log_every == 0 or state.step == steps:
                samples_per_second = (state.step - logged_step) * config.batch_size / step_seconds
                mean_loss = state.loss_sum / state.loss_steps
                metrics.write(line(**{
                    "train/loss": mean_loss, "train/learning_rate": learning_rate, "train/grad_norm": grad_norm,
                    "train/samples_per_second": round(samples_per_second, 1),
                    "train/tokens_per_second": round(samples_per_second * config.max_seq_len),
                    "train/peak_memory_gb": round(peak_memory_gb(device), 3)}))
                bar.set_postfix_str(f"loss {mean_loss:.3f}, {samples_per_second * config.max_seq_len / 1000:.0f}k tokens/s", refresh=False)
                logged_step, step_seconds, state.loss_sum, state.loss_steps = state.step, 0.0, 0.0, 0
            evaluate_if_due()
            if state.step % save_every == 0 or state.step == steps:
                line()
                save_checkpoint(run, state, model, optimizer, tokenizer)
            stop_if_asked()
    draw_training_curve(run.folder, metrics.lines, uniform_loss, unigram_loss)
    print(f"held-out loss: {state.last_eval_loss:.4f} at the end, {state.best_eval_loss:.4f} at best (step {state.best_step}); "
          f"accuracy {state.last_eval_accuracy:.1%}; {state.seconds:.0f} s, at most {peak_memory_gb(device):.2f} GB")
    if state.last_eval_loss > unigram_loss - HUGS_UNIGRAM:
        print(f"warning: that is no better than guessing by word frequency ({unigram_loss:.2f}): the model has learnt little. "
              "A higher learning_rate, more epochs or more text would help, in this order")
    return state


def model_card_facts(config: Config, tokens: Tokens, state: State) -> dict[str, str]:
    """What the model card tells of a finished run."""
    return {
        "trained on": f"{config.dataset}, {len(tokens.train):,} sequences of {config.max_seq_len} tokens, {config.epochs} epochs",
        "shape": f"{config.n_layers} layers, {config.n_heads} heads, {config.n_embed}-dim, {len(tokens.token_counts):,} tokens in the vocabulary",
        "steps": f"{state.step:,} of {config.batch_size} sequences, peak learning rate {peak_learning_rate(config):.3g}",
        "held-out MLM loss": f"{state.last_eval_loss:.4f} nats a masked token",
        "held-out MLM accuracy": f"{state.last_eval_accuracy:.1%}",
        "seed": str(config.seed),
    }


def _announce(config: Config, device: torch.device, steps: int, uniform_loss: float, unigram_loss: float) -> None:
    print(f"training: {steps:,} steps of {config.batch_size} sequences on {describe_device(device)}, {config.epochs} epochs")
    print(explain_learning_rate(config))
    print(f"losses to read against: {uniform_loss:.2f} is a uniform guess, {unigram_loss:.2f} a guess by word frequency, where step 0 stands")
    if reach(config, steps) < TOO_SHORT_A_REACH:
        print(f"warning: this run cannot learn: Adam moves a weight by at most the sum of the learning rates, {reach(config, steps):.2g} "
              f"here, and weights have to move by about 1. Train longer, or raise learning_rate"
              + (', or set lr_scaling = "auto"' if config.lr_scaling == "none" else ""))


def training_step(model: Bert, optimizer: torch.optim.Optimizer, masked: MaskedBatch, config: Config, step: int,
                  learning_rate: float) -> tuple[float, float]:
    """One update from one batch, in micro-batches. Returns the mean loss a masked token and the gradient's norm before clipping.

    Raises Diverged, with the weights as they were, when one of them is not finite.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    n_masked = masked.n_masked
    loss = 0.0
    for number, micro_batch in enumerate(micro_batches(masked, config.micro_batch_size)):
        if config.dropout:  # a function of (seed, step), so that a resumed run drops what the first would have dropped
            torch.manual_seed(int(random_bits(config.seed, step, number)[0] >> 1))
        part = masked_loss(*_forward(model, micro_batch), n_masked)
        part.backward()
        loss += part.item()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise Diverged(f"step {step}: the loss is {loss:g} and the gradient's norm {grad_norm:g}, so this step was not applied. The last "
                       "checkpoint is from before it. A lower learning_rate or a lower grad_clip usually helps")
    optimizer.step()
    return loss, grad_norm


def micro_batches(masked: MaskedBatch, size: int | None) -> Iterator[MaskedBatch]:
    """The batch in parts of at most `size` sequences; all of it when None."""
    n = len(masked.labels)
    for start in range(0, n, size or n):
        rows = slice(start, start + (size or n))
        yield MaskedBatch(masked.input_ids[rows], masked.positions[rows], masked.labels[rows])


@torch.no_grad()
def evaluate(model: Bert, held_out: Sequences, config: Config, run: Run) -> Evaluation | None:
    """Over all held-out sequences, with masks that never change. None when a signal arrived meanwhile."""
    model.eval()
    loss = n_correct = n_masked = 0
    for batch in evaluation_batches(held_out, config.batch_size):
        if run.stop_signal:
            return None
        masked = mask_batch(batch, seed=config.seed, probability=EVALUATION_PROBABILITY, vocab_size=model.config.vocab_size)
        batch_loss, batch_correct = masked_scores(*_forward(model, masked))
        loss, n_correct, n_masked = loss + batch_loss, n_correct + batch_correct, n_masked + masked.n_masked
    return Evaluation(loss / n_masked, n_correct / n_masked)


def _forward(model: Bert, masked: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the loss functions take: hidden [B * M, D], weight [V, D], bias [V], labels [B * M]."""
    device = model.output_bias.device
    input_ids = torch.from_numpy(masked.input_ids)
    attention_mask = input_ids != PAD_ID
    attention_mask = None if attention_mask.all() else attention_mask.to(device)
    hidden = model(input_ids.to(device), attention_mask, torch.from_numpy(masked.positions).to(device))
    return hidden, model.output_weight, model.output_bias, torch.from_numpy(masked.labels).reshape(-1).to(device)
