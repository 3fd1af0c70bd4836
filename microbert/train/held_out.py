"""Evaluation on the held-out sequences, which the processes share."""

import dataclasses
import itertools
import time

import numpy as np
import torch

from microbert.data.batches import evaluation_batches
from microbert.data.masking import EVALUATION_PROBABILITY, mask_batch
from microbert.data.shards import Sequences
from microbert.errors import Failed
from microbert.model.loss import masked_scores
from microbert.runtime.run import Run
from microbert.train.step import Learner

TIMES = 3  # timings of a batch; the fastest is the least disturbed by other programs


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss: nats per masked token. accuracy: share of masked tokens predicted correctly. seconds: duration.

    sequences: how many could be read, whatever n_batches was.
    """

    loss: float
    accuracy: float
    sequences: int
    seconds: float


@torch.no_grad()
def evaluate(
    learner: Learner, held_out: Sequences, run: Run, n_batches: int | None = None
) -> tuple[Evaluation | None, list[int]]:
    """Evaluate these held-out sequences, always with the same masks.

    n_batches: at most, of each process; None for all. Returns the result and the ranks that received a signal
    meanwhile; if there are any, the result is None. Raises Failed if no token can be masked.
    """
    learner.model.eval()
    while True:
        start = time.perf_counter()
        sums = learner.sizes.within_memory(lambda: _sums(learner, held_out, run, n_batches))
        loss, n_correct, n_masked = sums or (0.0, 0, 0)
        own_seconds = time.perf_counter() - start
        table, late = run.world.try_gather(
            loss, n_correct, n_masked, run.stop_signal is not None, own_seconds, sums is None
        )
        losses, corrects, counts, stopping, seconds, short = table.T  # [W] each
        if late:
            run.world.on_shortage(late)
        elif short.any():
            learner.sizes.halve_evaluation(np.flatnonzero(short).tolist())
        else:
            break
    if stopping.any():
        return None, np.flatnonzero(stopping).tolist()
    if not counts.sum():
        raise Failed(f"the held-out text has no token to mask: delete {run.config.cache_dir} and start again")
    return Evaluation(losses.sum() / counts.sum(), corrects.sum() / counts.sum(), len(held_out), seconds[0]), []


def estimate_evaluation(learner: Learner, held_out: Sequences, run: Run) -> float:
    """Return the estimated seconds of a round (`rounds`), the same in all processes; 0.0 if a signal interrupts it."""
    seconds = []
    for _ in range(1 + TIMES):
        result, _ = evaluate(learner, held_out, run, n_batches=1)
        if result is None:
            return 0.0
        seconds.append(result.seconds)
    return min(seconds[1:])  # the first batch also loads what the device needs


def rounds(n_sequences: int, learner: Learner, run: Run) -> int:
    """Return how many batches the first process reads when this many sequences are evaluated."""
    return -(-n_sequences // (learner.sizes.evaluation * run.world.size))


def _sums(learner: Learner, held_out: Sequences, run: Run, n_batches: int | None) -> tuple[float, int, int]:
    """Return sums over this process's share of the held-out sequences.

    They are the loss in nats, the masked tokens predicted correctly, and all masked tokens.
    """
    loss, n_correct, n_masked = 0.0, 0, 0
    batches = evaluation_batches(held_out, learner.sizes.evaluation, run.world.rank, run.world.size)
    for batch in itertools.islice(batches, n_batches):
        if run.stop_signal:
            break
        masked = mask_batch(
            batch, seed=run.config.seed, probability=EVALUATION_PROBABILITY, vocab_size=learner.model.config.vocab_size
        )
        batch_loss, batch_correct = masked_scores(*learner.hidden(masked))
        loss, n_correct, n_masked = loss + batch_loss, n_correct + batch_correct, n_masked + masked.n_masked
    return loss, n_correct, n_masked
