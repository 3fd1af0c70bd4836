"""Examples for the end of a run: short spans of held-out text with one word masked, and the model's guesses.

Shapes: T tokens of a text, M masked positions, V = vocabulary.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from microbert.data.shards import Sequences
from microbert.data.tokenizer import CLS_ID, MASK_ID, N_SPECIAL, SEP_ID, SPECIAL_TOKENS, token_names
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.counter_rng import permute, random_bits

N_EXAMPLES, N_GUESSES = 3, 5
SHORTEST, LONGEST = 8, 20  # tokens of a span: at least, if the text has that many, and at most
ROWS = 100  # held-out sequences to choose from
COMMON = 50  # the most frequent tokens, such as "the", are masked only if there is no other word
SENTENCE_ENDS = set(".!?\u3002\uff01\uff1f\u0964")  # with full-width ones, and the danda of Hindi
STREAM = 2**33  # separates these random numbers from those of training and evaluation, whose counters are epochs


@dataclasses.dataclass(frozen=True)
class Example:
    """text: with [MASK]. word, probability: the masked token and its prediction. guesses: the likeliest tokens."""

    text: str
    word: str
    probability: float
    guesses: list[tuple[str, float]]

    def lines(self) -> tuple[str, str]:
        """Return the text, and a line with the masked word and the guesses."""
        probability = f"{self.probability:.1%}" if self.probability >= 0.0005 else "below 0.1%"
        guesses = ", ".join(f'"{token}" {share:.1%}' for token, share in self.guesses)
        return self.text, f'   answer: "{self.word}" {probability}   guesses: {guesses}'


@dataclasses.dataclass(frozen=True)
class _Span:
    """A candidate: token ids, the index of the token to mask, and a rank that sorts the best candidate first."""

    ids: tuple[int, ...]
    masked: int
    rank: tuple[int, ...]


@torch.no_grad()
def probabilities_at(model: MaskedLanguageModel, ids: list[int], positions: list[int]) -> Tensor:
    """Return the probabilities of ordinary tokens at the positions: [M, V]. ids: [T], with [CLS] and [SEP]."""
    model = model.eval()
    device = model.output_bias.device
    logits = model.logits(torch.tensor([ids], device=device), None, torch.tensor([positions], device=device))
    logits[:, :N_SPECIAL] = -torch.inf
    return logits.softmax(dim=1)


def likeliest(probabilities: Tensor, names: list[str], n_best: int) -> list[tuple[str, float]]:
    """Return the n_best likeliest tokens with their probabilities. probabilities: [V]. names: the tokens by id."""
    best = probabilities.topk(min(n_best, len(probabilities) - N_SPECIAL))
    return [
        (names[token_id], share) for token_id, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def find_examples(
    model: MaskedLanguageModel,
    tokenizer: Tokenizer,
    held_out: Sequences,
    token_counts: np.ndarray,
    seed: int,
    n_examples: int = N_EXAMPLES,
) -> list[Example]:
    """Return up to n_examples examples from different held-out sequences; an empty list if no span qualifies.

    token_counts: [V], how often each token occurs. The spans depend on the text and the seed only, not on the model.
    """
    examples = []
    names = token_names(tokenizer)
    for span in _choose_spans(names, held_out, token_counts, seed, model.config.max_seq_len)[:n_examples]:
        ids = [CLS_ID, *span.ids, SEP_ID]
        ids[span.masked + 1] = MASK_ID
        [probabilities] = probabilities_at(model, ids, [span.masked + 1])
        word = span.ids[span.masked]
        text = _as_text([names[token_id] for token_id in span.ids], span.masked)
        guesses = likeliest(probabilities, names, N_GUESSES)
        examples.append(Example(text, names[word], float(probabilities[word]), guesses))
    return examples


def _choose_spans(
    names: list[str], held_out: Sequences, token_counts: np.ndarray, seed: int, max_seq_len: int
) -> list[_Span]:
    """Return the best span of each of some sequences, the best ones first."""
    n_sequences, longest = len(held_out), min(LONGEST, max_seq_len - 2)
    n_common = min(COMMON, (len(token_counts) - N_SPECIAL) // 10)
    common = set(np.argsort(-token_counts, kind="stable")[:n_common].tolist())
    numbers = permute(np.arange(min(n_sequences, ROWS)), n_sequences, seed, STREAM)
    best_of_rows: dict[tuple[int, ...], _Span] = {}  # by token ids: repeated text counts once
    for number, row in zip(numbers.tolist(), held_out.read(numbers).tolist(), strict=True):
        spans = list(_candidates(row, names, longest, common))
        if spans:
            lowest = min(span.rank for span in spans)
            spans = [span for span in spans if span.rank == lowest]
            span = spans[int(random_bits(seed, STREAM, number)[0] % np.uint64(len(spans)))]
            best_of_rows.setdefault(span.ids, span)
    return sorted(best_of_rows.values(), key=lambda span: span.rank)  # stable: equal ranks stay in the order drawn


def _candidates(row: list[int], names: list[str], longest: int, common: set[int]) -> Iterator[_Span]:
    """Yield each span of a sequence once for each of its single-token words.

    Text without such words, such as DNA, is cut anywhere, and any token may be masked.
    """
    for words in _whole_words(row, names):
        has_words, begins = False, True
        for span in _spans(words, names, longest):
            ids, start = tuple(token_id for word in span for token_id in word), 0
            ends = names[ids[-1]] in SENTENCE_ENDS
            for word in span:
                if len(word) == 1 and len(ids) > 1:
                    has_words = True
                    rank = 0, _dullness(word[0], names, common), _is_short(ids, longest), not (begins and ends)
                    yield _Span(ids, start, rank)
                start += len(word)
            begins = ends
        if not has_words:
            pieces = [token_id for word in words for token_id in word]
            for start in range(0, len(pieces) - 1, longest):
                ids = tuple(pieces[start : start + longest])
                for masked, token_id in enumerate(ids if len(ids) > 1 else ()):
                    yield _Span(ids, masked, (1, _dullness(token_id, names, common), _is_short(ids, longest)))


def _is_short(ids: tuple[int, ...], longest: int) -> bool:
    return len(ids) < min(SHORTEST, longest)


def _whole_words(row: list[int], names: list[str]) -> Iterator[list[list[int]]]:
    """Yield the words of each stretch of ordinary tokens, without those possibly cut at its ends, if others remain."""
    stretch: list[list[int]] = []
    is_full = row[-1] == SEP_ID  # so the text may be cut here
    for position, token_id in enumerate(row):
        if token_id >= N_SPECIAL:
            if stretch and names[token_id].startswith("##"):
                stretch[-1].append(token_id)
            else:
                stretch.append([token_id])
        elif stretch:
            if len(stretch) > 1 and is_full and position == len(row) - 1:
                stretch.pop()
            if len(stretch) > 1 and names[stretch[0][0]].startswith("##"):
                stretch.pop(0)
            yield stretch
            stretch = []


def _spans(words: list[list[int]], names: list[str], longest: int) -> Iterator[list[list[int]]]:
    """Yield consecutive words of at most `longest` tokens. The end of a sentence ends a span of SHORTEST or more."""
    span: list[list[int]] = []
    length = 0
    for word in words:
        if span and length + len(word) > longest:
            yield span
            span, length = [], 0
        if len(word) <= longest:
            span.append(word)
            length += len(word)
        if length >= SHORTEST and names[word[0]] in SENTENCE_ENDS:
            yield span
            span, length = [], 0
    if span:
        yield span


def _dullness(token_id: int, names: list[str], common: set[int]) -> int:
    """Return 0 for a word, 1 for a very frequent word or a single letter, 2 for punctuation."""
    token = names[token_id]
    if not any(character.isalnum() for character in token):
        return 2
    return int(token_id in common or len(token) == 1 and token.isascii())


def _as_text(names: list[str], masked: int) -> str:
    """Return tokens as one line of text, with word pieces joined and one token replaced by [MASK]."""
    text = ""
    for index, name in enumerate(names):
        shown = SPECIAL_TOKENS[MASK_ID] if index == masked else name.removeprefix("##")
        text += shown if not text or name.startswith("##") else f" {shown}"
    return " ".join(text.split())  # a token may hold a line break
