"""Masking: the rates of BERT, and masks that depend on (seed, epoch, sequence, position) alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import VOCAB_SIZE, as_batch, few_examples, many_examples, token_rows

from microbert.data.masking import IGNORED, mask_batch, n_slots
from microbert.data.tokenizer import CLS_ID, MASK_ID, N_SPECIAL

SIX_SIGMA = 6  # a correct sampler exceeds this once in 500 million trials
seeds = st.integers(0, 2**63 - 1)
probabilities = st.floats(0.01, 1.0)
lengths = st.integers(3, 40)
row_counts = st.integers(1, 20)


def mask(batch, seed=0, probability=0.15, vocab_size=VOCAB_SIZE):
    return mask_batch(batch, seed=seed, probability=probability, vocab_size=vocab_size)


def parts(masked):
    return masked.input_ids, masked.positions, masked.labels


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def same_labels(a, b):
    return np.array_equal(a.positions, b.positions) and np.array_equal(a.labels, b.labels)


def originals_and_results(rows, masked):
    """Return each masked token before and after masking."""
    used = masked.labels != IGNORED
    return (np.take_along_axis(array, masked.positions, axis=1)[used] for array in (rows, masked.input_ids))


@few_examples
@given(seeds, st.sampled_from([0.1, 0.15, 0.2, 0.4, 0.77]))
def test_the_share_of_masked_tokens_is_the_probability(seed, probability):
    rows = token_rows(1000, 40, shortest=10)  # long enough that the minimum of one masked token has no effect
    expected = probability * (rows >= N_SPECIAL).sum()
    # the count of a row is rounded up or down at random: its standard deviation is at most 0.5
    assert abs(mask(as_batch(rows), seed, probability).n_masked - expected) < SIX_SIGMA * 0.5 * np.sqrt(len(rows))


def test_all_as_mask_changes_what_the_same_tokens_become():
    rows = token_rows(200, 40)
    usual, blanks = (
        mask_batch(as_batch(rows), seed=3, probability=0.15, vocab_size=VOCAB_SIZE, all_as_mask=all_as_mask)
        for all_as_mask in (False, True)
    )
    assert same_labels(usual, blanks)
    _, after = originals_and_results(rows, blanks)
    assert (after == MASK_ID).all()
    _, after = originals_and_results(rows, usual)
    assert not (after == MASK_ID).all()


@few_examples
@given(seeds)
def test_80_percent_become_mask_10_another_token_10_are_unchanged(seed):
    vocab_size = 1000
    rows = token_rows(2000, 40, vocab_size, shortest=10)
    before, after = originals_and_results(rows, mask(as_batch(rows), seed, vocab_size=vocab_size))
    n = len(before)
    by_chance = 0.1 / (vocab_size - N_SPECIAL)  # probability that the drawn token is the original one
    for share, chosen in [
        (0.8, after == MASK_ID),
        (0.1, after == before),
        (0.1, (after != before) & (after != MASK_ID)),
    ]:
        assert abs(chosen.mean() - share) < SIX_SIGMA * np.sqrt(share * (1 - share) / n) + by_chance


def test_replacements_are_drawn_from_all_ordinary_tokens_only():
    vocab_size, original = 12, 8
    rows = np.full((3000, 20), original)
    rows[:, 0] = CLS_ID
    _, after = originals_and_results(rows, mask(as_batch(rows), vocab_size=vocab_size))
    counts = np.bincount(after[(after != MASK_ID) & (after != original)], minlength=vocab_size)
    drawn = np.delete(counts, original)[N_SPECIAL:]
    assert (counts[:N_SPECIAL] == 0).all() and len(counts) == vocab_size
    assert abs(drawn - drawn.mean()).max() < SIX_SIGMA * np.sqrt(drawn.mean()) < drawn.mean()


def test_every_position_is_masked_equally_often():
    rows = token_rows(5000, 22, shortest=20)
    masked = mask(as_batch(rows))
    counts = np.bincount(masked.positions[masked.labels != IGNORED], minlength=22)[1:21]
    assert abs(counts - masked.n_masked / 20).max() < SIX_SIGMA * np.sqrt(masked.n_masked / 20)


@many_examples
@given(row_counts, lengths, probabilities, seeds, st.integers(0, 2**32), st.integers(0, 100))
def test_labels_are_the_original_ids_and_other_tokens_are_unchanged(
    n, max_seq_len, probability, seed, epoch, rows_seed
):
    rows = token_rows(n, max_seq_len, seed=rows_seed)
    given_rows = rows.copy()
    masked = mask(as_batch(rows, epoch=epoch), seed, probability)
    assert np.array_equal(rows, given_rows)
    assert masked.positions.shape == masked.labels.shape == (n, n_slots(max_seq_len, probability))
    used = masked.labels != IGNORED
    assert masked.n_masked == used.sum()
    assert used.any(axis=1).all()  # at least one per row
    changed = masked.input_ids != rows
    for row, positions, labels, result, differs in zip(
        rows, masked.positions, masked.labels, masked.input_ids, changed, strict=True
    ):
        places = positions[labels != IGNORED]
        assert len(set(places)) == len(places)
        assert (row[places] >= N_SPECIAL).all()
        assert np.array_equal(labels[labels != IGNORED], row[places])
        assert not np.delete(differs, places).any()
        assert (positions[labels == IGNORED] == 0).all()
        new = result[differs]
        assert ((new == MASK_ID) | (new >= N_SPECIAL)).all() and (new < VOCAB_SIZE).all()


@many_examples
@given(st.data(), st.integers(2, 20), probabilities, seeds)
def test_a_mask_does_not_depend_on_the_batch_or_on_the_order_of_rows(data, n, probability, seed):
    rows = token_rows(n, 20)
    epochs = np.array(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)))
    whole = mask(as_batch(rows, epoch=epochs), seed, probability)
    chosen = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n)))
    part = mask(as_batch(rows[chosen], chosen, epochs[chosen]), seed, probability)
    assert all(np.array_equal(x, y[chosen]) for x, y in zip(parts(part), parts(whole), strict=True))


@few_examples
@given(seeds, st.integers(0, 2**31))
def test_a_mask_changes_with_seed_epoch_and_sequence(seed, epoch):
    rows = token_rows(16, 40, shortest=20)
    masked = mask(as_batch(rows, epoch=epoch), seed)
    assert same(masked, mask(as_batch(rows, epoch=epoch), seed))
    assert not same(masked, mask(as_batch(rows, epoch=epoch), seed ^ 1))
    assert not same(masked, mask(as_batch(rows, epoch=epoch + 1), seed))
    assert not same(masked, mask(as_batch(rows, np.arange(16) + 16, epoch), seed))


@many_examples
@given(st.lists(st.booleans(), min_size=1, max_size=12), probabilities, seeds)
def test_rows_that_only_fill_the_batch_get_no_labels_and_do_not_change_other_rows(real, probability, seed):
    rows, real = token_rows(len(real), 20), np.array(real)
    masked, all_real = mask(as_batch(rows, real=real), seed, probability), mask(as_batch(rows), seed, probability)
    assert (masked.labels[~real] == IGNORED).all() and np.array_equal(masked.input_ids[~real], rows[~real])
    assert all(np.array_equal(x[real], y[real]) for x, y in zip(parts(masked), parts(all_real), strict=True))


def test_a_row_without_ordinary_tokens_is_unchanged():
    rows = np.array([[2, 3, 0, 0], [2, 1, 3, 0], [2, 4, 1, 3]])
    masked = mask(as_batch(rows), probability=1.0)
    assert masked.n_masked == 0 and np.array_equal(masked.input_ids, rows)


@pytest.mark.parametrize(
    "max_seq_len, probability, slots", [(128, 0.15, 19), (3, 0.15, 1), (22, 0.15, 3), (22, 0.16, 4), (10, 1.0, 8)]
)
def test_the_number_of_slots_is_the_largest_number_of_masked_tokens_of_a_row(max_seq_len, probability, slots):
    assert n_slots(max_seq_len, probability) == slots
    rows = token_rows(500, max_seq_len, shortest=max_seq_len - 2)
    assert (mask(as_batch(rows), probability=probability).labels != IGNORED).sum(axis=1).max() == slots
