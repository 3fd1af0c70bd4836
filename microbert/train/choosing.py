"""Choose the learning rate and the number of epochs of fine-tuning on training texts held apart.

Two stages: the first folds choose the rate, the others then train with it, and all of its folds choose the epochs.
Shapes: N texts, E epochs.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from microbert.config.terminal import counted
from microbert.errors import Diverged
from microbert.model.classifier import TextClassifier
from microbert.runtime.counter_rng import random_bits
from microbert.runtime.metrics import progress_bar
from microbert.train.finetuning import (
    FEW_TEXTS,
    LabelledRows,
    Settings,
    Training,
    log_probabilities,
    passes_of_a_step,
)

RATES = (5e-5, 1e-4, 2e-4)  # for a 768-wide BERT
LEAST_EPOCHS, LEAST_STEPS = 4, 200  # the most epochs that are tried: 4, or as many as make 200 steps
PATIENCE = 0.25  # share of these epochs after which a training that no longer improves stops
FOLDS = 5  # below FEW_TEXTS; of more, a tenth is held apart
RATE_FOLDS = 2  # of these, where every rate is tried
MOST_TRAINED, MOST_JUDGED = 5_000, 2_500  # texts, where a tenth is held apart
FOLD, DRAWN = 3, 4  # streams of random numbers

Start = Callable[[], TextClassifier]  # returns a new model before its first step
Split = tuple[np.ndarray, np.ndarray]  # the numbers of the texts to train on, and of those to judge by


@dataclasses.dataclass(frozen=True)
class Judges:
    """The texts held apart that have chosen something. n_splits: 1 for a part held apart, otherwise folds."""

    n_texts: int
    n_splits: int

    def __str__(self) -> str:
        where = "held apart" if self.n_splits == 1 else f"in {self.n_splits} folds"
        return f"{counted(self.n_texts, 'training text')} {where}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """learning_rate: for a 768-wide BERT. accuracy: on the texts held apart. tokens_read: by the trainings.

    of_rate, of_epochs: by what they are chosen; None where they are given.
    """

    learning_rate: float
    epochs: int
    accuracy: float
    of_rate: Judges | None
    of_epochs: Judges | None
    tokens_read: int

    def __str__(self) -> str:
        rate, epochs = ("given" if of is None else f"chosen on {of}" for of in (self.of_rate, self.of_epochs))
        return (
            f"learning rate {self.learning_rate:g} {rate}, {counted(self.epochs, 'epoch')} {epochs} "
            f"({self.accuracy:.1%} right)"
        )


@dataclasses.dataclass(frozen=True)
class Curve:
    """How a learning rate did on texts held apart, after each epoch. accuracy, loss (nats a text): float64 [E]."""

    accuracy: np.ndarray
    loss: np.ndarray

    @classmethod
    def mean(cls, curves: Sequence["Curve"]) -> "Curve":
        """Return the mean over folds, for as many epochs as every fold has."""
        n_epochs = min(len(curve.loss) for curve in curves)
        return cls(
            *(np.mean([getattr(curve, name)[:n_epochs] for curve in curves], axis=0) for name in ("accuracy", "loss"))
        )

    def best_epoch(self, is_given: bool) -> int:
        """Return the index of the highest accuracy, and of the lowest loss among these; the last if E is given."""
        return len(self.loss) - 1 if is_given else int(np.lexsort((self.loss, -self.accuracy))[0])


def most_epochs(settings: Settings, n_texts: int) -> int:
    """Return the largest number of epochs that is tried: that of the settings, if given."""
    return settings.epochs or max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / math.ceil(n_texts / settings.batch_size)))


def splits_of(labels: np.ndarray, seed: int) -> list[Split]:
    """Return the texts to train on and to judge by: five folds, or, of FEW_TEXTS and more, a tenth once.

    Each fold has the same share of each label, as far as possible. labels: int64 [N].
    """
    numbers = np.arange(len(labels))
    order = np.lexsort((random_bits(seed, FOLD, numbers), labels))  # by label, and at random within a label
    if len(labels) < FEW_TEXTS:
        fold = np.empty(len(labels), np.int64)
        fold[order] = numbers % FOLDS
        return [(numbers[fold != one], numbers[fold == one]) for one in range(FOLDS) if (fold == one).any()]
    judged = np.sort(order[:: max(10, math.ceil(len(labels) / MOST_JUDGED))])
    others = np.setdiff1d(numbers, judged)
    drawn = np.argsort(random_bits(seed, DRAWN, others))[:MOST_TRAINED]
    return [(np.sort(others[drawn]), judged)]


def rates_of(settings: Settings) -> tuple[float, ...]:
    """Return the learning rates that are tried: that of the settings, if given."""
    return (settings.learning_rate,) if settings.learning_rate else RATES


def trainings(settings: Settings, n_splits: int) -> list[int]:
    """Return the number of trainings on each split: a rate each in stage 1, then one, or none if epochs are given."""
    n_rates, n_later = len(rates_of(settings)), 0 if settings.epochs else 1
    return [n_rates if number < RATE_FOLDS else n_later for number in range(n_splits)]


def most_tokens(texts: LabelledRows, settings: Settings) -> int:
    """Return the number of tokens that the trainings of `choose` read at most."""
    if settings.epochs and settings.learning_rate:
        return 0
    splits, lengths = splits_of(texts.labels, settings.seed), texts.lengths
    return (
        passes_of_a_step(settings)
        * most_epochs(settings, len(texts))
        * sum(
            n_trainings * int(lengths[train].sum())
            for n_trainings, (train, _) in zip(trainings(settings, len(splits)), splits, strict=True)
        )
    )


def choose(start: Start, texts: LabelledRows, settings: Settings, description: str) -> Choice | None:
    """Return the learning rate and the number of epochs with the highest accuracy; None if the settings have both.

    Stage 1 trains with every rate on RATE_FOLDS folds, and takes the rate with the highest mean accuracy. Stage 2
    trains with that rate on the other folds, and takes the number of epochs with the highest mean accuracy on all folds
    that this rate has trained on. If it diverges there, the next best one trains on the folds that are left. A tenth
    held apart serves for both stages.
    After each epoch the averaged weights are judged on the texts held apart; a training that no longer improves stops.
    The training proper then takes the chosen settings and all texts. That costs one training more than to keep a model
    of the search would, but no label is lost, and with folds there is no such model.
    Cost, in trainings of `most_epochs` on all texts: at most 7.2 below 5,000 texts, 2.7 with 5,000, 0.7 with 22,500,
    because the search then trains on MOST_TRAINED. `most_tokens` counts them. Judging adds a tenth or so.
    texts: those to train on, and no others. description: title of the progress bar. Raises Diverged if all rates do.
    """
    if settings.epochs and settings.learning_rate:
        return None
    search = _Search(start, texts, settings, description)
    folds = range(len(search.splits))
    for fold in folds[:RATE_FOLDS]:
        for rate in list(search.curves):
            search.train(rate, fold)
    by_rank = search.best_rates()
    for fold in folds[RATE_FOLDS:] if settings.epochs is None else ():
        if not search.train(by_rank[0], fold):
            del by_rank[0]
    rate = by_rank[0]
    curve = search.mean(rate)
    best = curve.best_epoch(settings.epochs is not None)
    return Choice(
        rate,
        best + 1,
        float(curve.accuracy[best]),
        None if settings.learning_rate else search.judges(folds[:RATE_FOLDS]),
        None if settings.epochs else search.judges(search.curves[rate]),
        search.tokens_read,
    )


def settle(settings: Settings, choice: Choice | None) -> Settings:
    """Return the settings with the chosen learning rate and number of epochs; unchanged without a choice."""
    if choice is None:
        return settings
    return dataclasses.replace(settings, learning_rate=choice.learning_rate, epochs=choice.epochs)


class _Search:
    """The trainings with every rate that has not diverged. curves: by rate and number of the fold."""

    def __init__(self, start: Start, texts: LabelledRows, settings: Settings, description: str) -> None:
        self._start, self._texts, self._settings, self._description = start, texts, settings, description
        self.splits = splits_of(texts.labels, settings.seed)
        self.curves: dict[float, dict[int, Curve]] = {rate: {} for rate in rates_of(settings)}
        self.tokens_read = 0

    def train(self, rate: float, fold: int) -> bool:
        """Add the curve of a rate on a fold; forget the rate and return False if it diverges.

        The first training of a rate stops when it no longer improves, and the others take as many epochs. Raises
        Diverged if it was the last rate.
        """
        train, judged = (self._texts.take(part) for part in self.splits[fold])
        title = f"{self._description}: choosing, fold {fold + 1} of {len(self.splits)}, learning rate {rate:g}"
        is_first = not self.curves[rate]
        n_epochs = most_epochs(self._settings, len(self._texts)) if is_first else len(self.mean(rate).loss)
        training = Training(self._start(), train, self._settings, rate)
        try:
            self.curves[rate][fold] = _curve(training, judged, self._settings, n_epochs, is_first, title)
        except Diverged:
            del self.curves[rate]
        self.tokens_read += training.tokens_read
        if not self.curves:
            raise Diverged("the loss is not finite with any learning rate that was tried; use a lower learning_rate")
        return rate in self.curves

    def mean(self, rate: float) -> Curve:
        return Curve.mean(list(self.curves[rate].values()))

    def best_rates(self) -> list[float]:
        """Return the rates by the mean accuracy and the mean loss at their best epochs."""

        def rank(rate: float) -> tuple[float, float]:
            curve = self.mean(rate)
            best = curve.best_epoch(self._settings.epochs is not None)
            return -curve.accuracy[best], curve.loss[best]

        return sorted(self.curves, key=rank)

    def judges(self, folds: Collection[int]) -> Judges:
        return Judges(sum(len(self.splits[fold][1]) for fold in folds), len(folds))


def _curve(
    training: Training, judged: LabelledRows, settings: Settings, n_epochs: int, may_stop: bool, title: str
) -> Curve:
    """Train for n_epochs, or, if it may stop, until neither accuracy nor loss has improved for a while."""
    patience = math.ceil(PATIENCE * n_epochs) if may_stop and settings.epochs is None else n_epochs
    found: list[tuple[float, float]] = []
    with progress_bar(n_epochs * training.steps_per_epoch, 0, title, " steps", leave=False) as bar:
        while len(found) < n_epochs:
            for _ in training.epoch():
                bar.update()
            with training.averaged() as model:
                found.append(judge(model, judged, settings.batch_size))
            accuracies, losses = zip(*found, strict=True)
            if len(found) - 1 - max(int(np.argmax(accuracies)), int(np.argmin(losses))) >= patience:
                break
    return Curve(*np.array(found).T)


def judge(model: TextClassifier, texts: LabelledRows, batch_size: int) -> tuple[float, float]:
    """Return the accuracy and the loss in nats a text."""
    found = log_probabilities(model, texts.rows, batch_size)
    labels = torch.from_numpy(texts.labels)
    return float((found.argmax(dim=1) == labels).float().mean()), float(torch.nn.functional.nll_loss(found, labels))
