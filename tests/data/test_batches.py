"""Batches: every sequence once per epoch, split across ranks, read by index."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import as_batch, as_sequences, many_examples, token_rows

from microbert.data.batches import evaluation_batches, steps_in_run, training_batch
from microbert.data.masking import mask_batch

row_counts = st.integers(1, 60)
seeds = st.integers(0, 2**63 - 1)


def whole_run(sequences, epochs, batch_size, seed):
    steps = steps_in_run(len(sequences), epochs, batch_size)
    return [
        training_batch(sequences, step=step, epochs=epochs, global_batch_size=batch_size, seed=seed)
        for step in range(steps)
    ]


def real_pairs(*batches):
    return [
        (int(epoch), int(i))
        for batch in batches
        for epoch, i in zip(batch.epochs[batch.real], batch.sequence_ids[batch.real], strict=True)
    ]


@many_examples
@given(row_counts, st.integers(1, 70), st.integers(1, 4), seeds)
def test_every_sequence_occurs_exactly_once_per_epoch(n, batch_size, epochs, seed):
    rows = token_rows(n)
    batches = whole_run(as_sequences(rows), epochs, batch_size, seed)
    pairs = real_pairs(*batches)
    assert sorted(pairs) == [(epoch, i) for epoch in range(epochs) for i in range(n)]
    assert [epoch for epoch, _ in pairs] == sorted(epoch for epoch, _ in pairs)  # one epoch after another
    for batch in batches:
        assert batch.input_ids.shape == (batch_size, rows.shape[1])
        assert np.array_equal(batch.input_ids, rows[batch.sequence_ids])
        assert len(batch.sequence_ids) == len(batch.epochs) == len(batch.real) == batch_size
    assert all(batch.real.all() for batch in batches[:-1]) and batches[-1].real.any()


def test_the_order_changes_with_epoch_and_seed():
    sequences = as_sequences(token_rows(50))
    orders = [[i for batch in whole_run(sequences, 2, 10, seed) for i in batch.sequence_ids] for seed in (1, 2)]
    four = {tuple(order[start : start + 50]) for order in orders for start in (0, 50)}
    assert len(four | {tuple(range(50))}) == 5


@many_examples
@given(row_counts, st.integers(1, 8), st.sampled_from([1, 2, 4]), st.integers(1, 3), seeds)
@pytest.mark.fault(row=14)
def test_the_batches_of_all_ranks_are_the_batch_of_one_process(n, rows_a_rank, world_size, epochs, seed):
    sequences, batch_size = as_sequences(token_rows(n)), rows_a_rank * world_size
    for step, whole in enumerate(whole_run(sequences, epochs, batch_size, seed)):
        shares = [
            training_batch(
                sequences,
                step=step,
                epochs=epochs,
                global_batch_size=batch_size,
                seed=seed,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        assert {len(share.input_ids) for share in shares} == {rows_a_rank}
        for name in ("input_ids", "sequence_ids", "epochs", "real"):
            assert np.array_equal(np.concatenate([getattr(share, name) for share in shares]), getattr(whole, name))
        pairs = real_pairs(*shares)
        assert len(set(pairs)) == len(pairs)


@pytest.mark.fault(row=14)
def test_the_masks_of_all_ranks_are_those_of_one_process():
    sequences = as_sequences(token_rows(20))
    masked = [
        mask_batch(
            training_batch(sequences, step=3, epochs=2, global_batch_size=8, seed=5, rank=rank, world_size=world_size),
            seed=5,
            probability=0.15,
            vocab_size=60,
        ).labels
        for world_size in (1, 4)
        for rank in range(world_size)
    ]
    assert np.array_equal(masked[0], np.concatenate(masked[1:]))


@pytest.mark.parametrize("batch_size, world_size", [(10, 4), (1, 2), (7, 3)])
def test_a_batch_that_cannot_be_split_evenly_is_refused(batch_size, world_size):
    with pytest.raises(ValueError, match=f"{batch_size}.*{world_size}"):
        training_batch(
            as_sequences(token_rows(20)), step=0, epochs=1, global_batch_size=batch_size, seed=0, world_size=world_size
        )


@many_examples
@given(row_counts, st.integers(1, 70))
def test_evaluation_reads_each_sequence_once_in_order(n, batch_size):
    rows = token_rows(n)
    batches = list(evaluation_batches(as_sequences(rows), batch_size))
    assert [i for _, i in real_pairs(*batches)] == list(range(n))
    assert np.array_equal(np.concatenate([batch.input_ids[batch.real] for batch in batches]), rows)
    assert all(len(batch.input_ids) == batch_size for batch in batches)


@pytest.mark.parametrize("batch_size", [3, 8, 100])
def test_evaluation_masks_do_not_depend_on_the_batch_size_and_differ_from_training(batch_size):
    rows = token_rows(30, 40, shortest=20)

    def labels(batches):
        return np.concatenate(
            [mask_batch(batch, seed=1, probability=0.15, vocab_size=60).labels[batch.real] for batch in batches]
        )

    held_out = labels(evaluation_batches(as_sequences(rows), batch_size))
    assert np.array_equal(held_out, labels(evaluation_batches(as_sequences(rows), 30)))
    assert not any(np.array_equal(held_out, labels([as_batch(rows, epoch=epoch)])) for epoch in range(10))


@many_examples
@given(row_counts, st.data())
def test_sequences_are_read_in_the_requested_order(n, data):
    rows = token_rows(n)
    rows[:, 1] = np.arange(n)  # all different
    sequences = as_sequences(rows)
    assert len(sequences) == n
    ids = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    read = sequences.read(ids)
    assert read.dtype == np.int64 and np.array_equal(read, rows[ids])
