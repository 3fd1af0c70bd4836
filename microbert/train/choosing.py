"""Choose the learning rate and the number of epochs of fine-tuning on training texts held apart.

Shapes: N texts, E epochs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from microbert.config.terminal import counted
from microbert.errors import Diverged
from microbert.model.classifier import TextClassifier
from microbert.runtime.counter_rng import random_bits
from microbert.runtime.metrics import progress_bar
from microbert.train.finetuning import FEW_TEXTS, LabelledRows, Settings, Training, log_probabilities

RATES = (5e-5, 1e-4, 2e-4)  # for a 768-wide BERT
LEAST_EPOCHS, LEAST_STEPS = 4, 200  # the most epochs that are tried: 4, or as many as make 200 steps
PATIENCE = 0.25  # share of these epochs after which a training that no longer improves stops
FOLDS = 5  # below FEW_TEXTS; of more, a tenth is held apart
MOST_TRAINED, MOST_JUDGED = 5_000, 2_500  # texts, where a tenth is held apart
FOLD, DRAWN = 3, 4  # streams of random numbers

Start = Callable[[], TextClassifier]  # returns a new model before its first step
Split = tuple[np.ndarray, np.ndarray]  # the numbers of the texts to train on, and of those to judge by


@dataclasses.dataclass(frozen=True)
class Choice:
    """learning_rate: for a 768-wide BERT. accuracy: on the texts held apart. tokens_read: by the trainings."""

    learning_rate: float
    epochs: int
    accuracy: float
    n_judged: int
    n_folds: int
    tokens_read: int

    def __str__(self) -> str:
        where = "training texts held apart" if self.n_folds == 1 else f"training texts, in {self.n_folds} folds"
        return (
            f"chosen on {self.n_judged:,} {where}: learning rate {self.learning_rate:g}, "
            f"{counted(self.epochs, 'epoch')} ({self.accuracy:.1%} right)"
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


def trainings(settings: Settings, n_folds: int) -> list[int]:
    """Return the number of rates that each fold tries: all in the first, one in the others."""
    return [1 if settings.learning_rate else len(RATES), *[1] * (n_folds - 1)]


def most_tokens(texts: LabelledRows, settings: Settings) -> int:
    """Return the number of tokens that the trainings of `choose` read at most."""
    if settings.epochs and settings.learning_rate:
        return 0
    splits, lengths = splits_of(texts.labels, settings.seed), texts.lengths
    return most_epochs(settings, len(texts)) * sum(
        n_rates * int(lengths[train].sum())
        for n_rates, (train, _) in zip(trainings(settings, len(splits)), splits, strict=True)
    )


def choose(start: Start, texts: LabelledRows, settings: Settings, description: str) -> Choice | None:
    """Return the learning rate and the number of epochs with the highest accuracy; None if the settings have both.

    Every rate trains on the first fold, and the best one on the others. After each epoch the averaged weights are
    judged on the texts held apart; a training that no longer improves stops. The training proper then takes the chosen
    settings and all texts. That costs one training more than to keep a model of the search would, but no label is lost,
    and with folds there is no such model.
    Cost, in trainings of `most_epochs` on all texts: at most 5.6 below 5,000 texts, 2.7 with 5,000, 0.7 with 22,500,
    because the search then trains on MOST_TRAINED. `most_tokens` counts them. Judging adds a tenth or so.
    texts: those to train on, and no others. description: title of the progress bar. Raises Diverged if all rates do.
    """
    if settings.epochs and settings.learning_rate:
        return None
    splits, curves, tokens_read = splits_of(texts.labels, settings.seed), _Curves(settings), 0
    for number, (n_rates, (train, judged)) in enumerate(zip(trainings(settings, len(splits)), splits, strict=True)):
        for rate in curves.best_rates()[:n_rates]:
            title = f"{description}: choosing, fold {number + 1} of {len(splits)}, learning rate {rate:g}"
            n_epochs = curves.n_epochs(rate) or most_epochs(settings, len(texts))
            model = start()
            training = Training(model, texts.take(train), settings, rate)
            try:
                curves.add(rate, _curve(training, texts.take(judged), settings, n_epochs, number == 0, title))
            except Diverged:
                curves.drop(rate)
            tokens_read += training.tokens_read
    rate = curves.best_rates()[0]
    curve = curves.mean(rate)
    best = curve.best_epoch(settings.epochs is not None)
    n_judged = sum(len(judged) for _, judged in splits)
    return Choice(rate, best + 1, float(curve.accuracy[best]), n_judged, len(splits), tokens_read)


def settle(settings: Settings, choice: Choice | None) -> Settings:
    """Return the settings with the chosen learning rate and number of epochs; unchanged without a choice."""
    if choice is None:
        return settings
    return dataclasses.replace(settings, learning_rate=choice.learning_rate, epochs=choice.epochs)


class _Curves:
    """The curves of every rate that has not diverged, one for each fold that it has trained on."""

    def __init__(self, settings: Settings) -> None:
        rates = (settings.learning_rate,) if settings.learning_rate else RATES
        self._of: dict[float, list[Curve]] = {rate: [] for rate in rates}
        self._epochs_are_given = settings.epochs is not None

    def add(self, rate: float, curve: Curve) -> None:
        self._of[rate].append(curve)

    def drop(self, rate: float) -> None:
        """Forget a rate that has diverged. Raises Diverged if it was the last one."""
        del self._of[rate]
        if not self._of:
            raise Diverged("the loss is not finite with any learning rate that was tried; use a lower learning_rate")

    def mean(self, rate: float) -> Curve:
        return Curve.mean(self._of[rate])

    def n_epochs(self, rate: float) -> int:
        """Return the number of epochs of this rate's trainings so far; 0 before the first."""
        return len(self.mean(rate).loss) if self._of[rate] else 0

    def best_rates(self) -> list[float]:
        """Return the rates, those that were tried on most folds first, then by accuracy and loss at the best epoch."""

        def rank(rate: float) -> tuple[float, ...]:
            if not self._of[rate]:
                return (0,)
            curve = self.mean(rate)
            best = curve.best_epoch(self._epochs_are_given)
            return -len(self._of[rate]), -curve.accuracy[best], curve.loss[best]

        return sorted(self._of, key=rank)


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
