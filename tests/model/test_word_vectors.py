"""The word embeddings of a new run, from the neighbours of the words in its text."""

import types

import numpy as np
import pytest
import torch
from configs import configure
from hypothesis import given
from hypothesis import strategies as st
from models import VOCAB_SIZE, as_sequences, many_examples, token_rows

from microbert.data.documents import Documents
from microbert.data.tokenizer import N_SPECIAL
from microbert.model import word_vectors as module
from microbert.model.build import build_model
from microbert.model.layers import ModelConfig
from microbert.model.word_vectors import count_neighbours, sample_ids, start_from_neighbours, word_vectors

TWO_TOPICS = range(N_SPECIAL, N_SPECIAL + 10), range(N_SPECIAL + 10, N_SPECIAL + 20)


def topics(n_sentences=400, seed=0):
    """Return sentences of six words, each of one of two topics, between special tokens: int64 [I]."""
    rng = np.random.default_rng(seed)
    return np.concatenate([[2, *rng.choice(TWO_TOPICS[number % 2], 6), 3] for number in range(n_sentences)])


def tokens_of(train):
    return types.SimpleNamespace(train=train)


def documents_of(ids):
    return Documents(ids.astype(np.uint16), np.zeros(0, np.uint64), np.zeros((0, 0, 0), np.int64), (8,))


@many_examples
@given(st.lists(st.integers(0, 9), max_size=40))
def test_neighbours_are_all_pairs_of_ordinary_tokens_within_the_window(ids):
    expected = np.zeros((10, 10))
    for i, first in enumerate(ids):
        for j, second in enumerate(ids):
            if i != j and abs(i - j) <= module.WINDOW and min(first, second) >= N_SPECIAL:
                expected[first, second] += 1 / abs(i - j)
    found = count_neighbours(np.array(ids, np.int64), 10)
    np.testing.assert_allclose(found.to_dense().numpy(), expected, rtol=1e-5)


def test_vectors_of_one_topic_are_alike_and_those_of_two_are_not():
    vectors = word_vectors(count_neighbours(topics(), 25), 2, seed=0)
    first, second = (torch.nn.functional.normalize(vectors[list(topic)]) for topic in TWO_TOPICS)
    assert (first @ first.T).min() > 0.5 > -0.5 > (first @ second.T).max()


def test_the_products_of_vectors_are_the_closest_of_their_rank_to_the_information_that_words_share(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 1)
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
    found = word_vectors(count_neighbours(ids, 30), 4, seed=0).numpy()
    np.testing.assert_allclose(found @ found.T, best @ best.T, atol=2e-5)  # the vectors themselves are turned


@pytest.mark.parametrize("n_embed", [4, 40])  # fewer and more numbers than tokens
def test_vectors_have_mean_zero_and_a_fixed_size_and_depend_on_the_seed_alone(n_embed):
    counts = count_neighbours(topics(), 30)
    vectors = word_vectors(counts, n_embed, seed=1)
    assert vectors.shape == (30, n_embed) and torch.equal(vectors, word_vectors(counts, n_embed, seed=1))
    assert not torch.allclose(vectors, word_vectors(counts, n_embed, seed=2), atol=1e-3)
    known = vectors[N_SPECIAL : N_SPECIAL + 20]
    assert known.mean(dim=0).abs().max() < 1e-6 and known.pow(2).mean().sqrt().item() == pytest.approx(module.RMS)
    assert not vectors[:N_SPECIAL].any() and not vectors[N_SPECIAL + 20 :].any()


def test_text_without_any_pair_gives_no_vectors():
    assert not word_vectors(count_neighbours(np.array([2, 7, 3]), 10), 4, seed=0).any()


def test_a_sample_comes_from_all_of_the_text(monkeypatch):
    monkeypatch.setattr(module, "SLICE", 10)
    monkeypatch.setattr(module, "MOST_IDS", 60)
    ids = np.arange(1005)
    found = sample_ids(tokens_of(documents_of(ids))).reshape(6, 10)
    assert (np.diff(found) == 1).all() and (np.diff(found[:, 0]) > 100).all() and (found[:, 0] % 10 == 0).all()
    assert sample_ids(tokens_of(documents_of(ids[:25]))).tolist() == list(range(25))
    rows = token_rows(3, max_seq_len=8)
    assert sample_ids(tokens_of(as_sequences(rows))).tolist() == rows.ravel().tolist()


@pytest.mark.parametrize("arch", ["bert", "modern"])
def test_only_tokens_with_neighbours_start_from_them_and_only_where_the_constant_says_so(arch):
    config = ModelConfig(VOCAB_SIZE, 1, 2, 8, 16, arch=arch)
    tokens, random = tokens_of(documents_of(topics())), build_model(config, 0).output_weight.detach()
    model = build_model(config, 0)
    assert start_from_neighbours(model, tokens, configure(embedding_init="random")) == 0
    assert torch.equal(model.output_weight, random)
    assert start_from_neighbours(model, tokens, configure(embedding_init="neighbours", seed=5)) == 20
    expected = random.clone()
    known = slice(N_SPECIAL, N_SPECIAL + 20)
    expected[known] = word_vectors(count_neighbours(topics(), VOCAB_SIZE), 8, seed=5)[known]
    shared = (model.output_weight.detach() - expected).unique(dim=0)
    torch.testing.assert_close(shared, shared[:1].expand_as(shared), atol=1e-7, rtol=0)
    assert 0.3 * module.SHARED_RMS < shared[0].pow(2).mean().sqrt() < 2 * module.SHARED_RMS
