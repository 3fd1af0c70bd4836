"""Fine-tuning sees every text once an epoch, in batches of similar length, and ends with the mean of its weights."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from models import VOCAB_SIZE, noisy_model, token_rows

from microbert.data.tokenizer import N_SPECIAL
from microbert.errors import Diverged
from microbert.model.classifier import TextClassifier
from microbert.train.finetuning import (
    ADVERSARIAL,
    FEW_TEXTS,
    SORTED_BATCHES,
    LabelledRows,
    Settings,
    Training,
    batches_by_length,
    log_probabilities,
    right_answers,
    train_classifier,
    with_adversarial,
)

GIVEN = Settings(epochs=3, learning_rate=5e-5, batch_size=8, adversarial=0.01, device="cpu")


def labelled(n=64, seed=0):
    """Texts whose label tells whether more than half of their tokens are in the upper half of the vocabulary."""
    rows = token_rows(n, seed=seed, shortest=3).astype(np.int32)
    is_upper = (rows > (VOCAB_SIZE + N_SPECIAL) // 2).sum(axis=1) > 0.5 * (rows >= N_SPECIAL).sum(axis=1)
    return LabelledRows(rows, is_upper.astype(np.int64))


def classifier(arch="modern", seed=0):
    return TextClassifier(noisy_model(arch=arch, seed=seed), 2, seed)


def weights_after(settings, model=None):
    model = classifier() if model is None else model
    n_tokens = train_classifier(model, labelled(), settings, "training")
    return n_tokens, model.state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_every_text_is_in_one_batch_and_batches_are_of_similar_length():
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 513, 3_000)
    batches = batches_by_length(lengths, 32, rng)
    assert sorted(np.concatenate(batches)) == list(range(3_000))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    in_any_order = sum(len(batch) * lengths[batch].max() for batch in np.array_split(rng.permutation(3_000), 94))
    assert padded < 1.1 * lengths.sum() < 1.7 * lengths.sum() < in_any_order
    means = [lengths[batch].mean() for batch in batches]
    assert np.abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3  # not from short to long
    again = batches_by_length(lengths, 32, rng)
    assert {tuple(batch) for batch in batches}.isdisjoint(tuple(batch) for batch in again)


def test_few_texts_come_in_other_batches_each_epoch():
    rng, lengths = np.random.default_rng(0), np.arange(3, 3 + 2 * 8 * SORTED_BATCHES)
    first, second = (batches_by_length(lengths, 8, rng) for _ in range(2))
    assert len({frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}) == 0


@pytest.mark.parametrize("arch", ["bert", "modern"])
def test_the_same_seed_gives_the_same_weights(arch):
    (tokens, first), (_, second), (_, other) = (
        weights_after(settings, classifier(arch)) for settings in (GIVEN, GIVEN, dataclasses.replace(GIVEN, seed=43))
    )
    assert same(first, second) and not same(first, other)
    assert tokens == 3 * 2 * labelled().lengths.sum()  # three epochs of two passes
    tokens, _ = weights_after(dataclasses.replace(GIVEN, adversarial=0.0), classifier(arch))
    assert tokens == 3 * labelled().lengths.sum()


def test_the_adversarial_change_is_for_few_texts_unless_it_is_given():
    sizes = [with_adversarial(Settings(), n_texts).adversarial for n_texts in (1, FEW_TEXTS - 1, FEW_TEXTS)]
    assert sizes == [ADVERSARIAL, ADVERSARIAL, 0]
    assert with_adversarial(Settings(adversarial=0.5), 10**6).adversarial == 0.5
    assert with_adversarial(Settings(adversarial=0.0), 10).adversarial == 0


@pytest.mark.parametrize("trainable", ["classifier", "last_2"])
def test_with_frozen_layers_there_is_no_adversarial_change_unless_it_is_given(trainable):
    assert with_adversarial(Settings(trainable=trainable), 10).adversarial == 0
    assert with_adversarial(Settings(trainable=trainable, adversarial=0.5), 10).adversarial == 0.5


def test_the_adversarial_change_is_of_training_alone():
    (_, with_change), (_, without) = (
        weights_after(dataclasses.replace(GIVEN, adversarial=size)) for size in (0.01, 0.0)
    )
    assert not same(with_change, without)
    model, other, rows = classifier(), classifier(seed=1), labelled().rows
    training = Training(model, labelled(), GIVEN, 5e-5)
    for _ in training.epoch():
        pass
    other.load_state_dict(model.state_dict())
    assert torch.equal(log_probabilities(model, rows, 8), log_probabilities(other, rows, 8))  # between two epochs
    training.keep_average()
    assert not [hook for module in model.modules() for hook in module._forward_hooks]


@pytest.mark.parametrize(
    "n_texts, batch_size, epochs, window",
    [(64, 2, 4, 32), (8, 8, 120, 25), (2, 8, 60, 25)],  # an epoch of 32 steps, and of one
)
def test_it_ends_with_the_mean_of_its_last_weights(n_texts, batch_size, epochs, window):
    model = classifier()
    seen = [model.classifier.weight.detach().clone()]
    training = Training(model, labelled(n_texts), dataclasses.replace(GIVEN, batch_size=batch_size), 5e-5)
    for _ in range(epochs):
        for _ in training.epoch():
            seen.append(model.classifier.weight.detach().clone())
    last = seen[-1]
    with training.averaged() as averaged:
        mean = averaged.classifier.weight.detach().clone()
    assert torch.equal(model.classifier.weight, last)  # training can go on
    # growing linearly while the window is longer than the steps so far, and then exponentially over the window
    n_linear = 2 * window - 2
    shares = [number + 1 for number in range(n_linear + 1)]
    shares = [(1 - 1 / window) ** (len(seen) - 1 - n_linear) * share / sum(shares) for share in shares]
    n_after = len(seen) - len(shares)
    shares += [(1 - 1 / window) ** (n_after - 1 - number) / window for number in range(n_after)]
    assert sum(shares) == pytest.approx(1) and n_after > 0
    expected = sum(share * weight for share, weight in zip(shares, seen, strict=True))
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    assert (mean - last).abs().max() > 1e-3
    training.keep_average()
    assert torch.equal(model.classifier.weight, mean)


def test_it_learns():
    model = classifier()
    before = right_answers(model, labelled(seed=1), 8).mean()
    train_classifier(model, labelled(200, seed=2), dataclasses.replace(GIVEN, epochs=8), "training")
    assert right_answers(model, labelled(seed=1), 8).mean() > 0.75 > 0.65 > before


def test_answers_do_not_depend_on_the_batch_size():
    model, texts = classifier(), labelled()
    found = {size: log_probabilities(model, texts.rows, size) for size in (1, 7, 64)}
    torch.testing.assert_close(found[1], found[64], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[7], found[64], rtol=0, atol=1e-5)
    assert np.array_equal(right_answers(model, texts, 7), found[64].argmax(1).numpy() == texts.labels)
    torch.testing.assert_close(found[7].exp().sum(1), torch.ones(64))


def test_a_loss_that_is_not_finite_ends_it():
    with pytest.raises(Diverged, match="lower learning_rate"):
        train_classifier(copy.deepcopy(classifier()), labelled(), dataclasses.replace(GIVEN, learning_rate=1e30), "")
