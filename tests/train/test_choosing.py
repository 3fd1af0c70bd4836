"""Learning rate and epochs are chosen on training texts held apart, each label in its share."""

import dataclasses

import numpy as np
import pytest
import torch
from test_finetuning import GIVEN, classifier, labelled

from microbert.errors import Diverged
from microbert.train import choosing
from microbert.train.choosing import (
    FOLDS,
    MOST_JUDGED,
    MOST_TRAINED,
    RATE_FOLDS,
    RATES,
    Curve,
    Judges,
    choose,
    most_epochs,
    most_tokens,
    settle,
    splits_of,
    trainings,
)
from microbert.train.finetuning import FEW_TEXTS, Settings

OPEN = dataclasses.replace(GIVEN, epochs=None, learning_rate=None)


@pytest.mark.parametrize("n_texts", [7, 1000, FEW_TEXTS - 1])
def test_below_5000_texts_each_is_judged_once_in_five_folds(n_texts):
    labels = (np.random.default_rng(0).random(n_texts) < 0.3).astype(np.int64)
    splits = splits_of(labels, seed=1)
    assert len(splits) == FOLDS
    assert sorted(np.concatenate([judged for _, judged in splits])) == list(range(n_texts))
    for train, judged in splits:
        assert sorted([*train, *judged]) == list(range(n_texts))
        assert abs(labels[judged].sum() - labels.sum() / FOLDS) <= 1


@pytest.mark.parametrize("n_texts, n_judged", [(FEW_TEXTS, 500), (22_500, 2_250), (100_000, MOST_JUDGED)])
def test_of_more_texts_a_tenth_is_held_apart(n_texts, n_judged):
    labels = (np.random.default_rng(0).random(n_texts) < 0.3).astype(np.int64)
    [(train, judged)] = splits_of(labels, seed=1)
    assert len(judged) == n_judged and len(train) == min(MOST_TRAINED, n_texts - n_judged)
    assert not set(train) & set(judged) and len(set(train)) == len(train)
    assert abs(labels[judged].mean() - labels.mean()) < 0.01 and abs(labels[train].mean() - labels.mean()) < 0.03
    assert judged.tolist() != splits_of(labels, seed=2)[0][1].tolist()


def test_few_texts_get_more_epochs():
    assert [most_epochs(Settings(), n) for n in (1, 320, 1000, 5000, 10**6)] == [200, 20, 7, 4, 4]
    assert most_epochs(Settings(epochs=2), 10) == 2


def test_the_first_two_folds_try_every_rate_and_the_others_the_best_to_choose_epochs():
    assert trainings(Settings(), 5) == [3, 3, 1, 1, 1] and trainings(Settings(), 1) == [3]
    assert trainings(Settings(learning_rate=1e-4), 5) == [1, 1, 1, 1, 1]
    assert trainings(Settings(epochs=2), 5) == [3, 3, 0, 0, 0] and trainings(Settings(epochs=2), 1) == [3]


def test_the_best_epoch_has_the_highest_accuracy_and_then_the_lowest_loss():
    curve = Curve.mean(
        [
            Curve(np.array([0.5, 0.9, 0.7, 0.8]), np.array([0.7, 0.5, 0.3, 0.4])),
            Curve(np.array([0.5, 0.7, 0.9]), np.ones(3)),
        ]
    )
    assert curve.accuracy.tolist() == pytest.approx([0.5, 0.8, 0.8])
    assert curve.best_epoch(is_given=False) == 2


def recorded(monkeypatch, accuracy_of, diverges=lambda rate, n_before: False):
    """Replace the trainings by a record of them.

    accuracy_of(rate, epoch) -> what the texts held apart tell. diverges(rate, number of the rate's trainings before).
    """
    seen = []

    class Recorder(choosing.Training):
        def __init__(self, model, texts, settings, rate):
            super().__init__(model, texts, settings, rate)
            self.rate, self.n_epochs, self.n_before = rate, 0, sum(one.rate == rate for one in seen)
            seen.append(self)
            model.rate, model.training_of = rate, self

        def epoch(self):
            if diverges(self.rate, self.n_before):
                raise Diverged("the loss is not finite")
            self.n_epochs += 1
            self.tokens_read += 2 * int(self._lengths.sum())
            return iter(())

    monkeypatch.setattr(choosing, "Training", Recorder)
    monkeypatch.setattr(
        choosing, "judge", lambda model, texts, size: (accuracy_of(model.rate, model.training_of.n_epochs), 1.0)
    )
    return seen


def test_the_best_rate_and_epoch_win_and_the_cost_is_bounded(monkeypatch):
    texts, best = labelled(100), RATES[1]
    seen = recorded(monkeypatch, lambda rate, epoch: 0.9 - abs(epoch - 5) / 100 - 0.1 * (rate != best))
    choice = choose(classifier, texts, OPEN, "x")
    assert (choice.learning_rate, choice.epochs) == (best, 5)
    assert (choice.of_rate, choice.of_epochs) == (Judges(40, 2), Judges(100, 5))
    assert choice.accuracy == pytest.approx(0.9)
    assert [training.rate for training in seen] == [*RATES, *RATES, best, best, best]
    n_most = most_epochs(OPEN, 100)
    assert {training.n_epochs for training in seen} == {5 + int(np.ceil(choosing.PATIENCE * n_most))} != {n_most}
    assert choice.tokens_read == sum(training.tokens_read for training in seen) < most_tokens(texts, OPEN)
    assert str(choice) == (
        f"learning rate {best:g} chosen on 40 training texts in 2 folds, "
        "5 epochs chosen on 100 training texts in 5 folds (90.0% right)"
    )
    settled = settle(OPEN, choice)
    assert (settled.learning_rate, settled.epochs) == (best, 5)


def test_given_settings_are_taken_as_they_are(monkeypatch):
    seen = recorded(monkeypatch, lambda rate, epoch: epoch / 100)
    assert choose(classifier, labelled(), GIVEN, "x") is None and most_tokens(labelled(), GIVEN) == 0 and not seen
    assert settle(GIVEN, None) is GIVEN
    choice = choose(classifier, labelled(), dataclasses.replace(OPEN, learning_rate=3e-5), "x")
    assert choice.learning_rate == 3e-5 and [training.rate for training in seen] == [3e-5] * FOLDS
    assert str(choice).startswith("learning rate 3e-05 given, ")
    assert f"{choice.epochs} epochs chosen on 64 training texts in 5 folds (" in str(choice)
    seen.clear()
    given = dataclasses.replace(OPEN, epochs=2)
    choice = choose(classifier, labelled(), given, "x")
    assert choice.epochs == 2 and {training.n_epochs for training in seen} == {2}
    assert [training.rate for training in seen] == [*RATES, *RATES]  # nothing else is left to choose
    assert choice.tokens_read == most_tokens(labelled(), given)
    assert "chosen on 26 training texts in 2 folds, 2 epochs given (2.0% right)" in str(choice)


def test_a_part_held_apart_serves_for_both_stages(monkeypatch):
    texts = labelled(100)
    split = np.arange(90), np.arange(90, 100)
    monkeypatch.setattr(choosing, "splits_of", lambda labels, seed: [split])
    seen = recorded(monkeypatch, lambda rate, epoch: 0.9 - abs(epoch - 3) / 100 - 0.1 * (rate != RATES[0]))
    choice = choose(classifier, texts, OPEN, "x")
    assert [training.rate for training in seen] == list(RATES)
    assert str(choice) == (
        f"learning rate {RATES[0]:g} chosen on 10 training texts held apart, "
        "3 epochs chosen on 10 training texts held apart (90.0% right)"
    )


def test_the_rate_has_the_highest_mean_accuracy_of_both_first_folds(monkeypatch):
    """One is better in the first fold by less than it is worse in the second."""
    monkeypatch.setattr(choosing, "RATES", (1e-4, 2e-4))
    by_training = {1e-4: [0.8, 0.5, 0.6, 0.6, 0.6], 2e-4: [0.7, 0.7, 0.6, 0.6, 0.6]}
    seen = recorded(monkeypatch, None)
    monkeypatch.setattr(
        choosing, "judge", lambda model, texts, size: (by_training[model.rate][model.training_of.n_before], 1.0)
    )
    choice = choose(classifier, labelled(), OPEN, "x")
    assert choice.learning_rate == 2e-4 and choice.accuracy == pytest.approx(np.mean(by_training[2e-4]))
    assert [training.rate for training in seen] == [1e-4, 2e-4] * RATE_FOLDS + [2e-4] * (FOLDS - RATE_FOLDS)


@pytest.mark.parametrize("n_before, n_left", [(2, 2), (3, 1), (4, 0)])
def test_after_a_late_divergence_the_next_best_rate_trains_on_the_folds_that_are_left(monkeypatch, n_before, n_left):
    first, second, last = RATES
    order = {first: 0.9, second: 0.5, last: 0.7}
    seen = recorded(
        monkeypatch,
        lambda rate, epoch: order[rate] - abs(epoch - 2) / 100,
        lambda rate, number: rate == first and number == n_before,
    )
    choice = choose(classifier, labelled(100), OPEN, "x")
    later = [first] * (n_before - RATE_FOLDS + 1) + [last] * n_left
    assert [training.rate for training in seen] == [*RATES, *RATES, *later]
    assert (choice.learning_rate, choice.epochs, choice.accuracy) == (last, 2, pytest.approx(0.7))
    assert (choice.of_rate, choice.of_epochs) == (Judges(40, 2), Judges(40 + 20 * n_left, 2 + n_left))
    assert choice.tokens_read < most_tokens(labelled(100), OPEN)


def test_a_rate_that_diverges_in_one_of_the_first_folds_is_not_chosen(monkeypatch):
    recorded(monkeypatch, lambda rate, epoch: 0.9 - rate, lambda rate, number: rate == RATES[0] and number == 1)
    assert choose(classifier, labelled(100), OPEN, "x").learning_rate == RATES[1]
    recorded(monkeypatch, lambda rate, epoch: 0.9, lambda rate, number: number == 2)
    with pytest.raises(Diverged, match="lower learning_rate"):
        choose(classifier, labelled(100), OPEN, "x")


def test_no_text_is_trained_on_and_judged_by_in_the_same_fold(monkeypatch):
    texts, pairs = labelled(50), []
    curve = choosing._curve

    def watched(training, judged, *arguments):
        pairs.append(({bytes(row) for row in training._texts.rows}, {bytes(row) for row in judged.rows}))
        return curve(training, judged, *arguments)

    monkeypatch.setattr(choosing, "_curve", watched)
    choose(classifier, texts, dataclasses.replace(OPEN, epochs=1), "x")
    assert len(pairs) == 6
    for trained, judged in pairs:
        assert trained and judged and not trained & judged


def test_the_same_seed_chooses_the_same_and_leaves_the_start_as_it_was():
    model = classifier()
    settings = dataclasses.replace(OPEN, epochs=2)
    first, second = (choose(classifier, labelled(), settings, "x") for _ in range(2))
    assert first == second
    assert all(
        torch.equal(one, other) for one, other in zip(model.parameters(), classifier().parameters(), strict=True)
    )


def test_a_rate_that_diverges_is_left_out(monkeypatch):
    monkeypatch.setattr(choosing, "RATES", (1e30, 5e-5))
    assert choose(classifier, labelled(), dataclasses.replace(OPEN, epochs=1), "x").learning_rate == 5e-5
    monkeypatch.setattr(choosing, "RATES", (1e30, 1e31))
    with pytest.raises(Diverged, match="lower learning_rate"):
        choose(classifier, labelled(), dataclasses.replace(OPEN, epochs=1), "x")
