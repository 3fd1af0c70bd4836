"""The training loop and the evaluation.

Each process takes its share of every batch; what they add up to decides, so that all of them do the same at the same step.
"""

import collections
import dataclasses
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from microbert.config.learning_rate import explain_learning_rate, peak_learning_rate
from microbert.data.batches import evaluation_batches, steps_in_run, training_batch
from microbert.data.masking import EVALUATION_PROBABILITY, mask_batch
from microbert.data.shards import Sequences, Tokens
from microbert.errors import Diverged, Failed, Stopped
from microbert.model.build import unigram_entropy
from microbert.model.export import load_libraries
from microbert.model.layers import MaskedLanguageModel
from microbert.model.loss import masked_scores
from microbert.runtime.device import describe_compute, describe_device, is_compiled, out_of_memory, peak_memory_gb
from microbert.runtime.distributed import lost_process
from microbert.runtime.metrics import Metrics, draw_training_curve, progress_bar
from microbert.runtime.run import Run, stopped_by
from microbert.train.checkpoint import State, save_checkpoint
from microbert.train.optim import learning_rate_share, reach
from microbert.train.progress import Course
from microbert.train.resume import resume_together
from microbert.train.step import Learner, Step

LINES_PER_RUN = 100  # of training metrics, at most
# sum of the learning rates, times the width: v1's four dimensions stay at unigram entropy at a sum of 0.05, and learn at 0.5; v4's 128 learn at 0.04
TOO_SHORT_A_REACH, ENOUGH_REACH = 0.4, 4.0
HUGS_UNIGRAM = 0.05  # nats
TIMES = 3  # to time a batch of the held-out sequences: the fastest time is the least disturbed by other programs


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss: nats a masked token. accuracy: the share of masked tokens guessed right. seconds: that it took."""

    loss: float
    accuracy: float
    seconds: float


def train(run: Run, checkpoint: Path | None, model: MaskedLanguageModel, tokens: Tokens, tokenizer: Tokenizer) -> State:
    """Trains from the checkpoint (from scratch when None) to the last step, and returns where the run stands then.

    Raises Stopped after a signal, with everything saved; Diverged when loss or gradient stop being finite, before that step is applied;
    Failed when another process of the run is gone or silent, or memory runs out.
    """
    config, world, device = run.config, run.world, next(model.parameters()).device
    steps = steps_in_run(len(tokens.train), config.epochs, config.global_batch_size)
    uniform_loss, unigram_loss = (
        math.log(model.config.vocab_size),
        unigram_entropy(torch.from_numpy(tokens.token_counts)),
    )
    _announce(run, device, steps, uniform_loss, unigram_loss)
    loading_seconds = load_libraries(model.config) if config.max_minutes is not None and world.is_first else 0.0
    learner = Learner(model, config, world)
    state = resume_together(run, checkpoint, model, learner.optimizer, tokens)
    course = Course(config, steps, state.step, state.prepared_seconds, world.gather(loading_seconds)[0, 0])
    learner.ran_short, learner.number = state.micro_batch_size is not None, state.step
    if checkpoint is not None:
        print(
            f"going on after step {state.step}, from {checkpoint}"
            + learner.ran_short * f", with {state.micro_batch_size} sequences at a time"
        )
    try:
        metrics = _train(run, state, course, learner, tokens, tokenizer)
        peak_gb = _peak_gb(learner)
    except RuntimeError as error:
        if not out_of_memory(error) and (lost := lost_process(error)):
            raise Failed(f"step {state.step}: {lost}") from error
        raise
    world.leave_group()
    if world.is_first:
        masked = {"train": config.mlm_probability, "eval": EVALUATION_PROBABILITY}
        draw_training_curve(run.folder, metrics.lines, masked, uniform_loss, unigram_loss)
    print(
        f"held-out loss: {state.last_eval_loss:.4f} at the end, {state.best_eval_loss:.4f} at best (step {state.best_step}); "
        f"accuracy {state.last_eval_accuracy:.1%}, {tokens.corpus_counts.bits_per_byte(state.last_eval_loss):.3f} bits a byte of text; {state.seconds:.0f} s, at most {peak_gb:.2f} GB"
        + (" in any process" if world.size > 1 else "")
    )
    if state.last_eval_loss > unigram_loss - HUGS_UNIGRAM:
        print(
            f"warning: that is no better than guessing by word frequency ({unigram_loss:.2f}): the model has learnt little. "
            "A higher learning_rate, more epochs or more text would help, in this order"
        )
    return state


def _train(run: Run, state: State, course: Course, learner: Learner, tokens: Tokens, tokenizer: Tokenizer) -> Metrics:
    """The loop, from where `state` stands, which it moves on. Returns the metrics, which the first process alone writes."""
    config, world = run.config, run.world
    peak = peak_learning_rate(config)
    metrics = Metrics(run.folder, state.step, writes=world.is_first, for_tensorboard=config.report_to == "tensorboard")
    seconds_before, start = state.seconds, time.perf_counter()
    logged_step, step_seconds = state.step, 0.0
    unread: collections.deque[Step] = (
        collections.deque()
    )  # at most one behind the step that is under way, so that the device need not wait
    grad_norm, is_first_step = 0.0, True

    def seconds_now() -> float:
        state.seconds = seconds_before + time.perf_counter() - start
        return state.seconds

    def line(**values: float) -> dict[str, float]:
        n_sequences = min(state.step * config.global_batch_size, len(tokens.train) * config.epochs)
        return {
            "step": state.step,
            "epoch": round(n_sequences / len(tokens.train), 4),
            "tokens": n_sequences * config.max_seq_len,
            "seconds": round(seconds_now(), 3),
            **values,
        }

    def begin() -> None:
        course.begin(state.step, world.gather(seconds_now())[0, 0])

    def evaluate_now() -> list[int]:
        """Returns the ranks that were told to stop."""
        learner.number = state.step
        result, stopping = evaluate(learner, tokens.held_out, run)
        if result is not None:
            if result.loss < state.best_eval_loss:
                state.best_eval_loss, state.best_step = result.loss, state.step
            state.last_eval_loss, state.last_eval_accuracy, course.eval_seconds = (
                result.loss,
                result.accuracy,
                result.seconds,
            )
            metrics.write(line(**{"eval/loss": result.loss, "eval/accuracy": result.accuracy}))
            bar.write(
                f"step {state.step:>6}{of_steps}  held-out loss {result.loss:.4f}  accuracy {result.accuracy:.1%}"
            )
        return stopping

    def save() -> None:
        if not learner.is_finite():
            raise Diverged(
                f"step {state.step}: the weights are no longer finite, so they are not saved. The last checkpoint is from before it. A lower learning_rate "
                "usually helps"
            )
        if world.is_first:
            seconds_now()
            state.micro_batch_size = learner.micro_batch_size if learner.ran_short else None
            save_checkpoint(run, state, learner.model, learner.optimizer, tokenizer)

    def stop() -> None:
        save()
        bar.close()
        # together, so that nobody leaves, which makes torchrun end the others, before the first process has saved; and so that all say the same
        told = np.flatnonzero(world.gather(run.stop_signal is not None))
        world.leave_group()
        raise Stopped(
            stopped_by(run.stop_signal if len(told) == world.size else f"a signal to process {told[0]} of {world.size}")
        )

    of_steps = f"/{course.steps}" if config.max_minutes is None else ""
    with progress_bar(
        course.steps if of_steps else None, state.step, "training", " steps", shown=world.is_first
    ) as bar:
        if config.max_minutes is not None:
            eval_seconds = estimate_evaluation(learner, tokens.held_out, run)
            course.reserve_evaluation(eval_seconds, world.gather(seconds_now())[0, 0])
        evaluated = world.gather(metrics.has_evaluation(state.step))[0, 0]
        is_eval_due = course.is_due(state.step, config.eval_every, course.evaluations())
        begin()
        stopping = []
        if not evaluated and (is_eval_due or course.is_over):
            stopping = evaluate_now()
            begin()
        while not course.is_over and not stopping:
            step_start = time.perf_counter()
            batch = training_batch(
                tokens.train,
                step=state.step,
                epochs=config.epochs,
                global_batch_size=config.global_batch_size,
                seed=config.seed,
                rank=world.rank,
                world_size=world.size,
            )
            masked = mask_batch(
                batch, seed=config.seed, probability=config.mlm_probability, vocab_size=tokenizer.get_vocab_size()
            )
            learning_rate = peak * learning_rate_share(course.position, course.steps, config)
            unread.append(
                learner.step(
                    masked, state.step, learning_rate, run.stop_signal is not None, course.time_used(seconds_now())
                )
            )
            stopping = unread[-1].stopping
            state.step += 1
            course.move(state.step, unread[-1].time_used)
            is_log_due = course.is_due(state.step, None, LINES_PER_RUN)
            is_eval_due, is_save_due = (
                course.is_due(state.step, config.eval_every, course.evaluations()),
                course.is_due(state.step, config.save_every),
            )
            is_pause = bool(stopping) or is_log_due or is_eval_due or is_save_due
            while len(unread) > (0 if is_pause else 1):
                loss, grad_norm = unread.popleft().read()
                state.loss_sum += loss
                state.loss_steps += 1
            step_seconds += time.perf_counter() - step_start
            if is_first_step:
                bar.unpause()  # what was spent on evaluating and on compiling says nothing of the time that is left
            is_first_step = False
            bar.update(1)
            if is_log_due:
                samples_per_second = (state.step - logged_step) * config.global_batch_size / step_seconds
                mean_loss = state.loss_sum / state.loss_steps
                metrics.write(
                    line(
                        **{
                            "train/loss": mean_loss,
                            "train/learning_rate": learning_rate,
                            "train/grad_norm": grad_norm,
                            "train/samples_per_second": round(samples_per_second, 1),
                            "train/tokens_per_second": round(samples_per_second * config.max_seq_len),
                            "train/peak_memory_gb": round(_peak_gb(learner), 3),
                        }
                    )
                )
                share = "" if of_steps else f"{course.position / course.steps:.0%} of the time, "
                bar.set_postfix_str(
                    f"{share}loss {mean_loss:.3f}, {samples_per_second * config.max_seq_len / 1000:.0f}k tokens/s",
                    refresh=False,
                )
                logged_step, step_seconds, state.loss_sum, state.loss_steps = state.step, 0.0, 0.0, 0
            if is_eval_due and not stopping:
                stopping = evaluate_now()
            if is_save_due:
                save()
        if stopping:
            stop()
    return metrics


def _peak_gb(learner: Learner) -> float:
    """The most that any process of the run has held so far. To be called by all together."""
    return float(learner.world.gather(peak_memory_gb(learner.device)).max())


def _announce(run: Run, device: torch.device, steps: int, uniform_loss: float, unigram_loss: float) -> None:
    config = run.config
    limit = "" if config.max_minutes is None else f", or as far as {config.max_minutes:g} minutes reach"
    print(
        f"training: {steps:,} steps of {config.global_batch_size} sequences on {describe_device(device, run.world)}{describe_compute(config, device)}, "
        f"{config.epochs} {'epoch' if config.epochs == 1 else 'epochs'}{limit}"
    )
    if is_compiled(config, device) and device.type == "cuda":
        print(
            "compiling at the first step, for half a minute or so; --no-torch-compile starts at once, and takes up to twice the time for the steps after it"
        )
    print(explain_learning_rate(config))
    print(
        f"losses to read against: {uniform_loss:.2f} is a uniform guess, {unigram_loss:.2f} a guess by word frequency, where step 0 stands"
    )
    if reach(config, steps) * config.n_embed < TOO_SHORT_A_REACH:
        print(
            f"warning: this run cannot learn: a weight moves by about the sum of the learning rates at most, {reach(config, steps):.2g} "
            f"here, and weights have to move by about {ENOUGH_REACH / config.n_embed:.1g}. Train longer, or raise learning_rate"
            + (', or set lr_scaling = "auto"' if config.lr_scaling == "none" else "")
        )


def estimate_evaluation(learner: Learner, held_out: Sequences, run: Run) -> float:
    """Return the estimated seconds of an evaluation, the same in all processes; 0.0 where a signal interrupts it."""
    seconds = []
    for _ in range(1 + TIMES):
        result, _ = evaluate(learner, held_out, run, n_batches=1)
        if result is None:
            return 0.0
        seconds.append(result.seconds)
    n_batches = -(-len(held_out) // (learner.evaluation_batch_size * run.world.size))
    return n_batches * min(seconds[1:])  # the first one loads what the device needs


@torch.no_grad()
def evaluate(
    learner: Learner, held_out: Sequences, run: Run, n_batches: int | None = None
) -> tuple[Evaluation | None, list[int]]:
    """Over all held-out sequences, with masks that never change, shared by the processes; and the ranks that were told to stop meanwhile.

    No result where there are such. n_batches: of each process, at most; None for all.
    """
    learner.model.eval()
    while True:
        start = time.perf_counter()
        sums = learner.within_memory(lambda: _sums(learner, held_out, run, n_batches))
        loss, n_correct, n_masked = sums or (0.0, 0, 0)
        seconds = time.perf_counter() - start
        table, short_before = run.world.try_gather(
            loss, n_correct, n_masked, run.stop_signal is not None, seconds, sums is None
        )
        losses, corrects, counts, stopping, seconds, short = table.T
        if short_before:
            run.world.on_shortage(short_before)
        elif short.any():
            learner.ran_short_in_evaluation(np.flatnonzero(short).tolist())
        else:
            break
    if stopping.any():
        return None, np.flatnonzero(stopping).tolist()
    if not counts.sum():
        raise Failed(f"no held-out token can be masked: delete {run.config.cache_dir} and start again")
    return Evaluation(losses.sum() / counts.sum(), corrects.sum() / counts.sum(), seconds[0]), []


def _sums(learner: Learner, held_out: Sequences, run: Run, n_batches: int | None) -> tuple[float, int, int]:
    """Of this process's share of the held-out sequences: the loss in nats, the masked tokens predicted correctly, and
    all masked tokens. n_batches: as for `evaluate`."""
    loss = n_correct = n_masked = 0
    batches = evaluation_batches(held_out, learner.evaluation_batch_size, run.world.rank, run.world.size)
    for batch in itertools.islice(batches, n_batches):
        if run.stop_signal:
            break
        masked = mask_batch(
            batch, seed=run.config.seed, probability=EVALUATION_PROBABILITY, vocab_size=learner.model.config.vocab_size
        )
        batch_loss, batch_correct = masked_scores(*learner.hidden(masked))
        loss, n_correct, n_masked = loss + batch_loss, n_correct + batch_correct, n_masked + masked.n_masked
    return loss, n_correct, n_masked
