"""How often tokens occur near each other, and which part of the text is read for that."""

import types

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import as_sequences, many_examples, token_rows, with_text

from microbert.data import neighbours
from microbert.data.neighbours import count_neighbours, sample_ids
from microbert.data.tokenizer import N_SPECIAL


@many_examples
@given(st.lists(st.integers(0, 9), max_size=40))
def test_neighbours_are_all_pairs_of_ordinary_tokens_within_the_window(ids):
    expected = np.zeros((10, 10))
    for i, first in enumerate(ids):
        for j, second in enumerate(ids):
            if i != j and abs(i - j) <= neighbours.WINDOW and min(first, second) >= N_SPECIAL:
                expected[first, second] += 1 / abs(i - j)
    found = count_neighbours(np.array(ids, np.int64), 10)
    np.testing.assert_allclose(found.to_dense().numpy(), expected, rtol=1e-5)


def test_pairs_are_counted_across_the_parts_that_are_in_memory(monkeypatch):
    ids = np.random.default_rng(0).integers(0, 25, 500)
    whole = count_neighbours(ids, 25).to_dense()
    monkeypatch.setattr(neighbours, "COUNTED_IDS", 7)
    torch.testing.assert_close(count_neighbours(ids, 25).to_dense(), whole)


def test_a_sample_comes_from_all_of_the_text(monkeypatch):
    monkeypatch.setattr(neighbours, "SLICE", 10)
    monkeypatch.setattr(neighbours, "MOST_IDS", 60)
    ids = np.arange(1005)
    found = sample_ids(with_text(ids)).reshape(6, 10)
    assert (np.diff(found) == 1).all() and (np.diff(found[:, 0]) > 100).all() and (found[:, 0] % 10 == 0).all()
    assert sample_ids(with_text(ids[:25])).tolist() == list(range(25))


def test_packed_sequences_are_read_with_their_special_tokens():
    rows = token_rows(3, max_seq_len=8)
    assert sample_ids(types.SimpleNamespace(train=as_sequences(rows))).tolist() == rows.ravel().tolist()
