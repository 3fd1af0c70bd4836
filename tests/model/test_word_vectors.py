"""The word embeddings of a new run, from the neighbours of the words in its text."""

import numpy as np
import pytest
import torch
from configs import configure
from models import VOCAB_SIZE, with_text

from microbert.data import neighbours
from microbert.data.neighbours import count_neighbours
from microbert.data.tokenizer import N_SPECIAL
from microbert.errors import Stopped
from microbert.model import word_vectors as module
from microbert.model.build import build_model
from microbert.model.layers import ModelConfig
from microbert.model.word_vectors import mutual_information, start_from_neighbours, word_vectors

TWO_TOPICS = range(N_SPECIAL, N_SPECIAL + 10), range(N_SPECIAL + 10, N_SPECIAL + 20)


def topics(n_sentences=400, seed=0):
    """Return sentences of six words, each of one of two topics, between special tokens: int64 [I]."""
    rng = np.random.default_rng(seed)
    return np.concatenate([[2, *rng.choice(TWO_TOPICS[number % 2], 6), 3] for number in range(n_sentences)])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def information_of(ids, vocab_size):
    return mutual_information(count_neighbours(ids, vocab_size))


def test_vectors_of_one_topic_are_alike_and_those_of_two_are_not():
    vectors = word_vectors(information_of(topics(), 25), 2, seeded(0))
    first, second = (torch.nn.functional.normalize(vectors[list(topic)]) for topic in TWO_TOPICS)
    assert (first @ first.T).min() > 0.5 > -0.5 > (first @ second.T).max()


def test_the_products_of_vectors_are_those_of_exact_singular_vectors(monkeypatch):
    monkeypatch.setattr(neighbours, "WINDOW", 1)
    ids = np.random.default_rng(1).integers(N_SPECIAL, 30, 3000) ** 2 // 30  # some pairs more frequent than others
    counts = count_neighbours(ids, 30).to_dense().double().numpy()
    share = counts.sum(axis=1) / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        of_context = share**module.SMOOTHING / (share**module.SMOOTHING).sum()
        information = (
            np.log(counts / counts.sum() / np.outer(share, of_context))
            + np.log(counts / counts.sum() / np.outer(of_context, share))
        ) / 2
    information = np.where(np.isfinite(information), np.maximum(information, 0), 0)
    left, singular, _ = np.linalg.svd(information)
    best = left[:, :4] * np.sqrt(singular[:4])
    known = share > 0
    best[known] -= best[known].mean(axis=0)
    best *= module.RMS / np.sqrt((best[known] ** 2).mean())
    found = word_vectors(information_of(ids, 30), 4, seeded(0)).numpy()
    np.testing.assert_allclose(found @ found.T, best @ best.T, atol=2e-5)  # the vectors themselves are turned


@pytest.mark.parametrize("n_embed", [4, 40])  # fewer and more numbers than tokens
def test_vectors_have_mean_zero_and_a_fixed_size_and_depend_on_the_seed_alone(n_embed):
    information = information_of(topics(), 30)
    vectors = word_vectors(information, n_embed, seeded(1))
    assert vectors.shape == (30, n_embed) and torch.equal(vectors, word_vectors(information, n_embed, seeded(1)))
    assert not torch.allclose(vectors, word_vectors(information, n_embed, seeded(2)), atol=1e-3)
    known = vectors[N_SPECIAL : N_SPECIAL + 20]
    assert known.mean(dim=0).abs().max() < 1e-6 and known.pow(2).mean().sqrt().item() == pytest.approx(module.RMS)
    assert not vectors[:N_SPECIAL].any() and not vectors[N_SPECIAL + 20 :].any()


def test_vectors_do_not_depend_on_the_signs_of_singular_vectors(monkeypatch):
    """Rounding decides these, so they differ between numbers of threads."""
    information, real = information_of(topics(), 30), torch.linalg.svd
    expected = word_vectors(information, 8, seeded(1))

    def flipped(matrix, full_matrices):
        left, singular, right = real(matrix, full_matrices=full_matrices)
        signs = torch.tensor([-1.0, 1.0]).repeat(len(singular))[: len(singular)]
        return left * signs, singular, right * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    torch.testing.assert_close(word_vectors(information, 8, seeded(1)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ids", [[2, 7, 3], [2], ([5] * 20 + [6]) * 50])  # of the last, only one pair is informative
def test_text_without_two_informative_words_gives_no_vectors(ids):
    assert not word_vectors(information_of(np.array(ids), 10), 4, seeded(0)).any()


@pytest.mark.parametrize("calls", range(1, 8))
def test_a_stop_ends_the_work(calls):
    left = iter(range(calls))

    def check_stop():
        if next(left, None) is None:
            raise Stopped("test")

    model = build_model(ModelConfig(VOCAB_SIZE, 1, 2, 8, 16, arch="modern"), 0)
    with pytest.raises(Stopped):
        start_from_neighbours(model, with_text(topics()), configure(embedding_init="neighbours"), check_stop)


@pytest.mark.parametrize("arch", ["bert", "modern"])
def test_words_with_neighbours_start_from_them_and_all_share_a_vector_where_the_constant_says_so(arch):
    config = ModelConfig(VOCAB_SIZE, 1, 2, 8, 16, arch=arch)
    tokens, random = with_text(topics()), build_model(config, 0).output_weight.detach()
    model, again, other = (build_model(config, 0) for _ in range(3))
    start_from_neighbours(model, tokens, configure(embedding_init="random"))
    assert torch.equal(model.output_weight, random)
    for one, seed in ((model, 5), (again, 5), (other, 6)):
        start_from_neighbours(one, tokens, configure(embedding_init="neighbours", seed=seed))
    assert torch.equal(model.output_weight, again.output_weight) and not torch.equal(
        model.output_weight, other.output_weight
    )
    change = model.output_weight.detach() - random
    known = slice(N_SPECIAL, N_SPECIAL + 20)
    shared = change[0]
    assert 0.3 * module.SHARED_RMS < shared.pow(2).mean().sqrt() < 2 * module.SHARED_RMS
    unknown = torch.cat([change[:N_SPECIAL], change[N_SPECIAL + 20 :]])
    torch.testing.assert_close(unknown, shared.expand_as(unknown), atol=1e-7, rtol=0)
    vectors = model.output_weight.detach()[known] - shared
    assert vectors.mean(dim=0).abs().max() < 1e-6 and vectors.pow(2).mean().sqrt().item() == pytest.approx(module.RMS)
