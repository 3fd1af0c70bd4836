"""The training loop.

Each process trains on its share of every batch. Every decision is made from numbers that all processes have,
so all of them do the same at the same step.
"""

import collections
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from microbert.config import COMMAND_STARTED
from microbert.config.learning_rate import explain_learning_rate, peak_learning_rate
from microbert.config.terminal import counted
from microbert.data.masking import EVALUATION_PROBABILITY, mask_batch
from microbert.data.row_lengths import describe_rows, describe_step
from microbert.data.shards import Sequences, Tokens
from microbert.data.training_rows import TrainingRows, training_rows
from microbert.errors import Diverged, Failed, Stopped
from microbert.model.build import unigram_entropy
from microbert.model.export import load_libraries
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.device import describe_compute, describe_device, is_compiled, out_of_memory, peak_memory_gb
from microbert.runtime.distributed import lost_process
from microbert.runtime.metrics import draw_training_curve, progress_bar
from microbert.runtime.run import Run, stopped_by
from microbert.train.checkpoint import State, save_checkpoint
from microbert.train.health_check import Health, HealthCheck
from microbert.train.held_out import estimate_evaluation, evaluate, rounds
from microbert.train.log import TrainingLog
from microbert.train.progress import Progress, duration
from microbert.train.resume import resume_together
from microbert.train.schedule import learning_rate_share, sum_of_learning_rates
from microbert.train.step import Learner, Step

LINES_PER_RUN = 100  # of training metrics, at most
SAMPLE_SEQUENCES = 1024  # held-out sequences of an evaluation before the end, in a run with max_minutes
# sum of the learning rates times n_embed: v1 (4 dimensions) stays at unigram entropy at a sum of 0.05, and learns at
# 0.5; v4 (128 dimensions) learns at 0.04
TOO_SHORT_A_REACH, ENOUGH_REACH = 0.4, 4.0
NEAR_UNIGRAM = 0.05  # nats


def train(run: Run, checkpoint: Path | None, model: MaskedLanguageModel, tokens: Tokens, tokenizer: Tokenizer) -> State:
    """Train from the checkpoint, or from scratch if it is None, to the last step. Return the state at the end.

    Raises Stopped after a signal, with everything saved; Diverged if the loss or the gradient is not finite, before
    that step is applied; Failed if another process ends or hangs, or memory runs out.
    """
    config, world = run.config, run.world
    rows = training_rows(tokens, config)
    uniform_loss, unigram_loss = _reference_losses(model, tokens)
    _announce(run, model.output_bias.device, rows.steps, uniform_loss, unigram_loss)
    loading_seconds = load_libraries(model.config) if config.max_minutes is not None and world.is_first else 0.0
    learner = Learner(model, config, world)
    state = resume_together(run, checkpoint, model, learner.optimizer, tokens)
    progress = Progress(config, rows.steps, state.step, state.prepared_seconds, world.gather(loading_seconds)[0, 0])
    learner.sizes.ran_short, learner.sizes.step = state.micro_batch_size is not None, state.step
    if checkpoint is not None:
        micro_batch = state.micro_batch_size
        size = f", with {describe_rows(micro_batch, config)} at a time" if micro_batch is not None else ""
        print(f"resuming after step {state.step}, from {checkpoint}{size}")
    total = rows.steps if config.max_minutes is None else None
    try:
        with progress_bar(total, state.step, "training", " steps", shown=world.is_first) as bar:
            log = TrainingLog(run, state, progress, rows, bar)
            health_check = HealthCheck(model, config, tokens, learner.sizes)
            sample = tokens.held_out.sample(SAMPLE_SEQUENCES)
            _Training(run, state, progress, learner, tokens, sample, rows, tokenizer, log, health_check).loop()
        peak_gb = _peak_gb(learner)
    except RuntimeError as error:
        if not out_of_memory(error) and (lost := lost_process(error)):
            raise Failed(f"step {state.step}: {lost}") from error
        raise
    world.leave_group()
    if world.is_first:
        masked = {"train": config.mlm_probability, "eval": EVALUATION_PROBABILITY}
        draw_training_curve(run.folder, log.metrics.lines, masked, uniform_loss, unigram_loss)
    _print_outcome(run, state, tokens, unigram_loss, peak_gb, is_resumed=checkpoint is not None)
    return state


@dataclasses.dataclass
class _Training:
    """The loop, and its evaluations, checkpoints and stop."""

    run: Run
    state: State
    progress: Progress
    learner: Learner
    tokens: Tokens
    sample: Sequences
    rows: TrainingRows
    tokenizer: Tokenizer
    log: TrainingLog
    health_check: HealthCheck

    def loop(self) -> None:
        """Train to the end of the run, updating `state`. Raises Stopped as `train` does."""
        run, state, progress, config = self.run, self.state, self.progress, self.run.config
        peak, vocab_size = peak_learning_rate(config), self.tokenizer.get_vocab_size()
        unread: collections.deque[Step] = collections.deque()  # at most one, so that the device need not wait
        stopping = self.begin()
        while not (progress.is_over or stopping):
            self.log.begin_step()
            batch = self.rows.batch(state.step, run.world.rank, run.world.size)
            masked = mask_batch(batch, seed=config.seed, probability=config.mlm_probability, vocab_size=vocab_size)
            learning_rate = peak * learning_rate_share(progress.position, progress.steps, config)
            time_used = progress.time_used(self.log.seconds())
            step = self.learner.step(masked, state.step, learning_rate, run.stop_signal is not None, time_used)
            stopping = step.stopping
            unread.append(step)
            state.step += 1
            progress.move(state.step, step.time_used)

            is_log_due = progress.is_due(state.step, None, LINES_PER_RUN)
            is_eval_due = progress.is_due(state.step, config.eval_every, progress.evaluations())
            is_save_due = progress.is_due(state.step, config.save_every)
            reads_all = bool(stopping) or is_log_due or is_eval_due or is_save_due
            while len(unread) > (0 if reads_all else 1):
                self.log.add(*unread.popleft().read())
            self.log.end_step()

            if is_log_due:
                self.log.write_training(learning_rate, _peak_gb(self.learner))
            if is_eval_due and not stopping:
                stopping = self.evaluate()
            if is_save_due:
                self.save()
        if not stopping and not self.is_evaluated():  # the time ran out during an evaluation of the sample
            stopping = self.evaluate()
        if stopping:
            self.save_and_stop()

    def begin(self) -> list[int]:
        """Evaluate before the first step, if that is due, and set the position. Return the ranks to stop."""
        state, progress, world = self.state, self.progress, self.run.world
        if self.run.config.max_minutes is not None:
            seconds = estimate_evaluation(self.learner, self.tokens.held_out, self.run)
            look, table = world.gather(*(self.health_check.estimate() if world.is_first else (0.0, 0.0)))[0].tolist()
            self.set_eval_seconds(seconds, look)
            progress.reserve_table(table, world.gather(self.log.seconds())[0, 0])
        is_eval_due = progress.is_due(state.step, self.run.config.eval_every, progress.evaluations())
        progress.begin(state.step, world.gather(self.log.seconds())[0, 0])
        if self.is_evaluated() or not (is_eval_due or progress.is_over):
            return []
        stopping = self.evaluate()
        progress.begin(state.step, world.gather(self.log.seconds())[0, 0])
        return stopping

    def to_evaluate(self) -> Sequences:
        """Return the held-out sequences to evaluate now: a sample before the end of a run with max_minutes."""
        return self.tokens.held_out if self.run.config.max_minutes is None or self.progress.is_over else self.sample

    def is_evaluated(self) -> bool:
        """Return whether the evaluation of this step is recorded, and set the state to it, which may not be saved."""
        n_sequences = len(self.to_evaluate())
        line = self.log.metrics.evaluation(self.state.step, n_sequences)  # in the first process
        if line is not None:
            self.set_result(line["eval/loss"], line["eval/accuracy"], n_sequences)
        return bool(self.run.world.gather(line is not None)[0, 0])

    def set_result(self, loss: float, accuracy: float, n_sequences: int) -> None:
        """Set the last evaluation of the state, and the best one. A loss on the sample is not compared with others."""
        state = self.state
        if n_sequences == len(self.tokens.held_out) and loss < state.best_eval_loss:
            state.best_eval_loss, state.best_step = loss, state.step
        state.last_eval_loss, state.last_eval_accuracy = loss, accuracy

    def set_eval_seconds(self, seconds: float, look_seconds: float) -> None:
        """Update how long evaluations are expected to take. seconds: of a round. look_seconds: of `look`."""
        for_sample, for_all = (rounds(len(one), self.learner, self.run) for one in (self.sample, self.tokens.held_out))
        self.progress.sample_seconds = seconds * for_sample + look_seconds
        self.progress.eval_seconds = seconds * for_all + look_seconds

    def evaluate(self) -> list[int]:
        """Evaluate, log it and return the ranks that received a signal meanwhile."""
        self.learner.sizes.step = self.state.step
        result, stopping = evaluate(self.learner, self.to_evaluate(), self.run)
        if result is not None:
            self.set_result(result.loss, result.accuracy, result.sequences)
            health, seconds = self.look()
            self.set_eval_seconds(result.seconds / rounds(result.sequences, self.learner, self.run), seconds)
            self.log.write_evaluation(result, health)
            if health is not None:
                is_warmed_up = self.progress.position > self.run.config.warmup_ratio * self.progress.steps
                self.log.show(self.health_check.warnings(health, is_warmed_up))
        return stopping

    def look(self) -> tuple[Health | None, float]:
        """Return the health of the model, in the first process, and the seconds that this took, in all of them."""
        start = time.perf_counter()
        health = self.health_check.look() if self.run.world.is_first else None
        return health, float(self.run.world.gather(time.perf_counter() - start)[0, 0])

    def save(self) -> None:
        """Write a checkpoint. Raises Diverged if a weight is not finite."""
        if not self.learner.is_finite():
            raise Diverged(
                f"step {self.state.step}: the weights are not finite, so they are not saved. The last checkpoint is "
                "from before that. A lower learning_rate usually helps"
            )
        if self.run.world.is_first:
            self.log.seconds()  # updates `state`
            self.state.micro_batch_size = self.learner.sizes.micro_batch if self.learner.sizes.ran_short else None
            save_checkpoint(self.run, self.state, self.learner.model, self.learner.optimizer, self.tokenizer)

    def save_and_stop(self) -> None:
        """Save a checkpoint, and raise Stopped in all processes.

        The processes leave together, after the first process has saved: torchrun ends the others as soon as one leaves.
        """
        self.save()
        self.log.close()
        run, world = self.run, self.run.world
        ranks = np.flatnonzero(world.gather(run.stop_signal is not None))
        world.leave_group()
        own = run.stop_signal if len(ranks) == world.size else None
        raise Stopped(stopped_by(own or f"a signal to process {ranks[0]} of {world.size}"))


def _reference_losses(model: MaskedLanguageModel, tokens: Tokens) -> tuple[float, float]:
    """Return the losses of a uniform guess and of a guess by word frequency, in nats per masked token."""
    return math.log(model.config.vocab_size), unigram_entropy(torch.from_numpy(tokens.token_counts))


def _peak_gb(learner: Learner) -> float:
    """Return the peak memory of any process of the run. Call it in all of them."""
    return float(learner.world.gather(peak_memory_gb(learner.device)).max())


def _announce(run: Run, device: torch.device, steps: int, uniform_loss: float, unigram_loss: float) -> None:
    config = run.config
    limit = "" if config.max_minutes is None else f", or fewer within {config.max_minutes:g} minutes"
    print(
        f"training: {steps:,} steps of {describe_step(config)} on {describe_device(device, run.world)}"
        f"{describe_compute(config, device)}, {counted(config.epochs, 'epoch')}{limit}"
    )
    if is_compiled(config, device) and device.type == "cuda":
        print(
            "compiling at the first steps, for about half a minute each\n"
            "  (--no-torch-compile starts at once, but steps take up to twice as long)"
        )
    print(explain_learning_rate(config))
    print(
        f"reference losses: {uniform_loss:.2f} for a uniform guess, {unigram_loss:.2f} for a guess by word frequency"
        f"{', as at step 0' if config.embedding_init == 'random' else ''}"
    )
    reach = sum_of_learning_rates(config, steps)
    if reach * config.n_embed < TOO_SHORT_A_REACH:
        scaling = ', or set lr_scaling = "auto"' if config.lr_scaling == "none" else ""
        print(
            "warning: this run cannot learn. A weight moves at most by about the sum of the learning rates, "
            f"{reach:.2g},\n  and has to move by about {ENOUGH_REACH / config.n_embed:.1g}. Train longer, or raise "
            f"learning_rate{scaling}"
        )


def _print_outcome(
    run: Run, state: State, tokens: Tokens, unigram_loss: float, peak_gb: float, is_resumed: bool
) -> None:
    best = f" at the end, {state.best_eval_loss:.4f} at best (step {state.best_step})"
    print(
        f"held-out loss: {state.last_eval_loss:.4f}{best if state.best_step != state.step else ''}; "
        f"accuracy {state.last_eval_accuracy:.1%}, "
        f"{tokens.corpus_counts.bits_per_byte(state.last_eval_loss):.3f} bits per byte of text"
    )
    print(
        f"time: {duration(time.perf_counter() - COMMAND_STARTED)} since the command started; "
        f"{duration(state.seconds)} of training{' over all starts' if is_resumed else ''}; "
        f"memory: at most {peak_gb:.2f} GB{' in any process' if run.world.size > 1 else ''}"
    )
    if state.last_eval_loss > unigram_loss - NEAR_UNIGRAM:
        print(
            f"warning: that loss is no better than guessing by word frequency ({unigram_loss:.2f}): the model has "
            "learned little.\n  Try a higher learning_rate, more epochs or more text, in this order"
        )
