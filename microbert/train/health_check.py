"""Is the model healthy while it trains? A quick look at each evaluation, and warnings that say what to do.

A recipe tuned for one loss at one length can make a model brittle: its weights and attention logits grow without bound,
and it fills the blanks of short texts with "the". The held-out loss at the training length shows none of this. The
limits come from runs that were brittle and runs that were not (docs/evaluate.md).
"""

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
import torch

from microbert.config.constants import ResolvedConfig
from microbert.data.shards import Tokens
from microbert.model.health import LOGIT_ROWS, WeightsRms, largest_attention_logit, weights_rms
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.device import send
from microbert.train.by_length import (
    AT_THE_END,
    LENGTHS,
    Sums,
    choose_documents,
    held_out_text,
    masked_rows,
    readable_lengths,
    score,
    tokens_to_read,
)
from microbert.train.held_out import TIMES
from microbert.train.shortage import BatchSizes

TOKENS = 2400  # read at each of the two lengths: about 0.3 s for v4 on two CPU cores
# RMS of a layer's matrix times sqrt(n_embed). Brittle: 3.4 to 5.5. Not brittle: 0.7 to 2.7
LARGE_WEIGHTS = 3.2
# v4 reached 102 in a healthy run of 106 minutes (docs/experiments.md). Above 1,000, which a larger model trained with
# Muon exceeded, its authors see a risk of divergence (Kimi Team 2025, arXiv:2507.20534, figure 2)
LARGE_LOGIT = 1000.0
SHORT_IS_WORSE = 1.0  # nats; healthy runs have 0.4


def _fastest(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few calls: the least disturbed by other programs."""
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def largest_healthy_rms(n_embed: int) -> float:
    """Return the root mean square of a layer's matrix above which models of this width were brittle."""
    return LARGE_WEIGHTS / math.sqrt(n_embed)


@dataclasses.dataclass(frozen=True)
class Health:
    """A quick look at a model.

    attention_logit: the largest, None without a document for it. short_loss, long_loss: in nats per masked token, at
    the shortest length of LENGTHS and at the longest one up to max_seq_len; None without documents of that length.
    """

    weights: WeightsRms
    attention_logit: float | None
    short_loss: float | None
    long_loss: float | None

    def metrics(self) -> dict[str, float]:
        """Return the figures that are finite, by the names of their metrics."""
        values = {
            "health/weights_rms": self.weights.largest,
            "health/embeddings_rms": self.weights.embeddings,
            "health/attention_logit": self.attention_logit,
            f"eval/loss_{LENGTHS[0]}": self.short_loss,
            "eval/loss_at_max": self.long_loss,
        }
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


class HealthCheck:
    """Looks at a model, always at the same blanks of the same held-out documents."""

    def __init__(self, model: MaskedLanguageModel, config: ResolvedConfig, tokens: Tokens, sizes: BatchSizes) -> None:
        self._model, self._config, self._sizes = model, config, sizes
        self._text = held_out_text(tokens)
        lengths = [length for length in readable_lengths(model) if length <= config.max_seq_len]
        self._chosen: dict[int, np.ndarray] = {}  # numbers of documents by length: of the shortest and of the longest
        for length in [*lengths[:1], *lengths[-1:]]:
            numbers = choose_documents(self._text.documents, length, TOKENS // length, config.seed)
            if len(numbers):
                self._chosen[length] = numbers
        self._warned: set[str] = set()

    def look(self) -> Health | None:
        """Return what the model looks like; None if memory runs out. Changes no weight and no random number."""
        return self._sizes.within_memory(self._look)

    @torch.no_grad()
    def _look(self) -> Health:
        losses = {}
        for length in self._chosen:
            sums = self._score(length, draws=1)
            losses[length] = sums.loss / sums.masked
        logit = None
        if losses:
            longest = max(losses)
            numbers = self._chosen[longest][:LOGIT_ROWS]
            rows = masked_rows(self._text.documents, numbers, np.zeros_like(numbers), longest, self._config.seed)
            logit = largest_attention_logit(self._model, send(rows.input_ids, self._model.output_bias.device))
        return Health(
            weights_rms(self._model),
            logit,
            losses.get(LENGTHS[0]),
            losses[max(losses)] if losses and max(losses) > LENGTHS[0] else None,
        )

    def estimate(self) -> tuple[float, float]:
        """Return the estimated seconds of `look`, and of the table by length at the end of the run."""
        self.look()  # the first one also loads what the device needs
        look_seconds = _fastest(self.look)
        if not self._chosen:
            return look_seconds, 0.0
        length = max(self._chosen)
        numbers = self._chosen[length]
        draws = max(1, self._batch_tokens() // (len(numbers) * length))  # a full batch
        batch_seconds = _fastest(lambda: self._sizes.within_memory(lambda: self._score(length, draws)))
        n_tokens = tokens_to_read(self._model, self._text, AT_THE_END, self._config.seed)
        return look_seconds, batch_seconds * n_tokens / (len(numbers) * draws * length)

    def _score(self, length: int, draws: int) -> Sums:
        """Return the sums over the documents of this length."""
        seed, numbers = self._config.seed, self._chosen[length]
        return score(self._model, self._text, numbers, length, draws, seed, self._batch_tokens())

    def _batch_tokens(self) -> int:
        return self._sizes.evaluation * self._config.max_seq_len

    def warnings(self, health: Health, is_warmed_up: bool) -> list[str]:
        """Return warnings about the model that no earlier call has returned. is_warmed_up: the rate has risen."""
        found = {}
        if health.weights.largest > (limit := largest_healthy_rms(self._config.n_embed)):
            found["weights"] = (
                f"warning: the weights are running away: the root mean square of a matrix is "
                f"{health.weights.largest:.2f} (healthy at this width: below {limit:.2f}).\n  The model becomes "
                f"brittle, above all on short texts. Use a higher weight_decay, such as "
                f"{max(0.1, 3 * self._config.weight_decay):g}, or a lower learning_rate"
            )
        if health.attention_logit is not None and health.attention_logit > LARGE_LOGIT:
            found["logits"] = (
                f"warning: the attention logits are running away: the largest is {health.attention_logit:.0f} "
                f"(healthy: below {LARGE_LOGIT:,.0f}).\n  Heads then see one token each and hardly learn any more. Use "
                "a lower learning_rate or a higher weight_decay"
            )
        short, long = health.short_loss, health.long_loss
        if is_warmed_up and short is not None and long is not None and short - long > SHORT_IS_WORSE:
            found["short"] = (
                f"warning: short texts are far worse than long ones: held-out loss {short:.2f} at {LENGTHS[0]} tokens, "
                f"{long:.2f} at {max(self._chosen)}.\n  Use a higher weight_decay or a lower learning_rate, or "
                "train on shorter texts too (python -m microbert.evaluate shows the loss at each length)"
            )
        new = [text for name, text in found.items() if name not in self._warned]
        self._warned |= found.keys()
        return new
