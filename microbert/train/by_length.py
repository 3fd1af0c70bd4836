"""Held-out loss by the length of the input: how good a model is at short texts and at long ones.

A row is [CLS], the first L - 2 ids of a held-out document of at least L tokens, and [SEP]. 15 % of its ordinary tokens
become [MASK], at least one, as in the blanks of a user. That is about 0.3 nats harder than the masks of `held_out`,
where one in ten chosen tokens stays visible. Masks depend on (seed, draw, document, position) alone, so models are
compared on the same blanks. Logits are computed in fp32, as by the exported folder.
Shapes: D documents, B rows of a batch, L tokens of a row, M masked slots of a row, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from microbert.data.batches import Batch
from microbert.data.masking import EVALUATION_PROBABILITY, IGNORED, MaskedBatch, mask_batch
from microbert.data.shards import Tokens
from microbert.data.tokenizer import CLS_ID, N_SPECIAL, PAD_ID, SEP_ID
from microbert.model.build import log_frequencies
from microbert.model.layers import MaskedLanguageModel
from microbert.model.loss import masked_scores
from microbert.runtime.counter_rng import permute
from microbert.runtime.device import send

LENGTHS = (8, 16, 32, 64, 128, 256, 512)
STREAM = 2**36  # separates these random numbers from those of training, evaluation (2**32) and examples (2**33)
MOST_DRAWS = 20
BATCH_TOKENS = 4096  # tokens computed at a time; more are no faster on a CPU


class Sample(NamedTuple):
    """How much is measured at a length.

    documents: at most. draws: of masks for each of them, at least. tokens: fewer documents have more draws, at most
    MOST_DRAWS, until the model reads so many tokens.
    """

    documents: int
    draws: int
    tokens: int = 0

    def draws_for(self, documents: int, length: int) -> int:
        """Return the number of draws for so many documents."""
        return max(self.draws, min(MOST_DRAWS, self.tokens // (documents * length)))


# at the end of a run: about 5 s for v4 on two CPU cores
TOKENS_AT_THE_END = 20_000
AT_THE_END = {length: Sample(min(500, TOKENS_AT_THE_END // length), 1, TOKENS_AT_THE_END) for length in LENGTHS}


def thorough(documents: int) -> dict[int, Sample]:
    """Return what the command measures at each length. Few tokens of a short row are masked, so it has more draws."""
    return {length: Sample(documents, MOST_DRAWS if length <= 32 else max(1, 256 // length)) for length in LENGTHS}


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """Documents to measure on, and what their tokens are worth.

    documents: uint16 or uint32 [D, n], the first n ids of each, without special tokens, padded with PAD_ID.
    token_counts: int64 [V], the word frequencies of the unigram loss. bits_per_byte: converts
    nats a token.
    """

    documents: np.ndarray
    token_counts: np.ndarray
    bits_per_byte: Callable[[float], float]


def held_out_text(tokens: Tokens) -> HeldOutText:
    """Return the held-out documents of a prepared corpus."""
    return HeldOutText(tokens.held_out_documents, tokens.token_counts, tokens.corpus_counts.bits_per_byte)


@dataclasses.dataclass(frozen=True)
class LengthScore:
    """How well a model fills blanks in inputs of `length` tokens. Losses are in nats per masked token.

    unigram_loss: of guessing by frequency only. bits_per_byte: of the loss. change: the loss minus that at the length
    before, both on the documents of at least `length` tokens; None for the first length.
    """

    length: int
    documents: int
    masked_tokens: int
    loss: float
    accuracy: float
    unigram_loss: float
    bits_per_byte: float
    change: float | None


@dataclasses.dataclass(frozen=True)
class LossByLength:
    """scores: of each length, the shortest first. missing: lengths that no document has."""

    scores: list[LengthScore]
    missing: list[int]


class Sums(NamedTuple):
    """Sums over masked tokens: losses in nats, and counts."""

    loss: float = 0.0
    unigram_loss: float = 0.0
    correct: int = 0
    masked: int = 0

    def plus(self, other: "Sums") -> "Sums":
        """Return the sums over both."""
        return Sums(
            self.loss + other.loss,
            self.unigram_loss + other.unigram_loss,
            self.correct + other.correct,
            self.masked + other.masked,
        )


def readable_lengths(model: MaskedLanguageModel) -> list[int]:
    """Return those of LENGTHS that the positions of the model allow."""
    return [length for length in LENGTHS if length <= model.config.max_seq_len]


def choose_documents(documents: np.ndarray, length: int, at_most: int, seed: int) -> np.ndarray:
    """Return numbers of documents with at least `length` tokens, in a random order that is the same at every length.

    A document counts its [CLS] and [SEP], and must have an ordinary token among the first ones.
    """
    n_ids = length - 2
    if not len(documents) or n_ids > documents.shape[1]:
        return np.zeros(0, np.int64)
    long_enough = (documents[:, n_ids - 1] != PAD_ID) & (documents[:, :n_ids] >= N_SPECIAL).any(axis=1)
    order = permute(np.arange(len(documents)), len(documents), seed, STREAM)
    return order[long_enough[order]][:at_most]


def masked_rows(documents: np.ndarray, numbers: np.ndarray, draws: np.ndarray, length: int, seed: int) -> MaskedBatch:
    """Return the first tokens of documents as masked rows: [B, L]. numbers, draws: of each row, [B]."""
    rows = np.empty((len(numbers), length), np.int64)
    rows[:, 0], rows[:, -1], rows[:, 1:-1] = CLS_ID, SEP_ID, documents[numbers, : length - 2]
    batch = Batch(rows, numbers, STREAM + draws, np.ones(len(rows), bool))
    # no token is drawn, so the size of the vocabulary does not matter
    return mask_batch(batch, seed=seed, probability=EVALUATION_PROBABILITY, vocab_size=N_SPECIAL + 1, all_as_mask=True)


@torch.no_grad()
def score(
    model: MaskedLanguageModel,
    text: HeldOutText,
    numbers: np.ndarray,
    length: int,
    draws: int,
    seed: int,
    batch_tokens: int = BATCH_TOKENS,
) -> Sums:
    """Return the sums over the first `length` tokens of these documents. numbers: [D], repeated for each draw."""
    model = model.eval()
    device, sums = model.output_bias.device, Sums()
    frequencies = log_frequencies(torch.from_numpy(text.token_counts).double()).numpy()
    for masked in _batches(text.documents, numbers, length, draws, seed, max(1, batch_tokens // length)):
        labels = send(masked.labels, device).reshape(-1)
        hidden = model(send(masked.input_ids, device), None, send(masked.positions, device))
        loss, correct = masked_scores(hidden, model.output_weight, model.output_bias, labels)
        unigram_loss = -float(frequencies[masked.labels[masked.labels != IGNORED]].sum())
        sums = sums.plus(Sums(loss, unigram_loss, correct, masked.n_masked))
    return sums


def _batches(
    documents: np.ndarray, numbers: np.ndarray, length: int, draws: int, seed: int, batch_size: int
) -> Iterator[MaskedBatch]:
    """Yield all draws of the first document, then those of the next."""
    n_rows = len(numbers) * draws
    for start in range(0, n_rows, batch_size):
        rows = np.arange(start, min(start + batch_size, n_rows))
        yield masked_rows(documents, numbers[rows // draws], rows % draws, length, seed)


class _Part(NamedTuple):
    """What to measure at a length: on its documents, and on those of the next length, for the change. [D] each."""

    length: int
    own: np.ndarray
    of_next: np.ndarray
    draws: int


def _parts(
    model: MaskedLanguageModel, text: HeldOutText, samples: dict[int, Sample], seed: int
) -> tuple[list[_Part], list[int]]:
    """Return what to measure, and the lengths that no document has. Arguments as for `loss_by_length`."""
    lengths = readable_lengths(model)
    chosen = {length: choose_documents(text.documents, length, samples[length].documents, seed) for length in lengths}
    present = [length for length in lengths if len(chosen[length])]
    parts = [
        _Part(length, own, of_next, samples[length].draws_for(len(own), length))
        for length, following in itertools.zip_longest(present, present[1:])
        for own, of_next in [(chosen[length], chosen[following] if following else np.zeros(0, np.int64))]
    ]
    return parts, [length for length in lengths if not len(chosen[length])]


def tokens_to_read(model: MaskedLanguageModel, text: HeldOutText, samples: dict[int, Sample], seed: int) -> int:
    """Return how many tokens the model reads in `loss_by_length`."""
    parts, _ = _parts(model, text, samples, seed)
    return sum(part.length * part.draws * len(np.union1d(part.own, part.of_next)) for part in parts)


def loss_by_length(
    model: MaskedLanguageModel,
    text: HeldOutText,
    samples: dict[int, Sample],
    seed: int,
    batch_tokens: int = BATCH_TOKENS,
    on_length: Callable[[int], object] = lambda length: None,
) -> LossByLength:
    """Measure the model at each length that its positions allow and a document has.

    samples: by length. batch_tokens: tokens computed at a time, and one row at least. on_length: called before each
    length. The model is on any device, and does not change.
    """
    parts, missing = _parts(model, text, samples, seed)
    scores: list[LengthScore] = []
    loss_before = None  # at the length before, on the documents of this one
    for length, own, of_next, draws in parts:
        on_length(length)
        is_in_both = np.isin(own, of_next)
        apart, both, next_only = (
            score(model, text, numbers, length, draws, seed, batch_tokens)
            for numbers in (own[~is_in_both], own[is_in_both], of_next[~np.isin(of_next, own)])
        )
        sums, on_next = apart.plus(both), both.plus(next_only)
        loss = sums.loss / sums.masked
        scores.append(
            LengthScore(
                length=length,
                documents=len(own),
                masked_tokens=sums.masked,
                loss=loss,
                accuracy=sums.correct / sums.masked,
                unigram_loss=sums.unigram_loss / sums.masked,
                bits_per_byte=text.bits_per_byte(loss),
                change=None if loss_before is None else loss - loss_before,
            )
        )
        loss_before = on_next.loss / max(1, on_next.masked)
    return LossByLength(scores, missing)
