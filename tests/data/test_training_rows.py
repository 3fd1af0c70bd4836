"""The order of training rows: each once per epoch, the same for any number of processes, from any step on."""

import dataclasses

import numpy as np
import pytest
from configs import configure, configure_v4, resolve
from hypothesis import given
from hypothesis import strategies as st
from models import as_sequences, few_examples, many_examples, token_rows
from test_batches import real_pairs

from microbert.data import training_rows as module
from microbert.data.batches import training_batch
from microbert.data.documents import Documents, in_tables
from microbert.data.masking import IGNORED, mask_batch, n_slots
from microbert.data.pieces import PLANS, cut_documents
from microbert.data.row_lengths import draw_weights, row_lengths
from microbert.data.tokenizer import CLS_ID, N_SPECIAL, PAD_ID, SEP_ID
from microbert.data.training_rows import DocumentRows, Mix, PackedRows

VOCAB_SIZE = 60
seeds = st.integers(0, 2**63 - 1)
document_sizes = st.lists(st.integers(1, 300), min_size=1, max_size=8)


def small_config(**constants):
    return resolve(configure_v4(**{"n_layers": 1, "batch_size": 4, "max_seq_len": 32, "arch": "bert", **constants}))


def documents_of(sizes, config, n_blocks=1):
    """Return random documents of these sizes, prepared in blocks."""
    ids = np.random.default_rng(0).integers(N_SPECIAL, VOCAB_SIZE, sum(sizes)).astype(np.uint16)
    lengths, blocks, done, ids_before = row_lengths(config), [], 0, 0
    for block in np.array_split(np.array(sizes), n_blocks):
        plans = [cut_documents(block, done, config.seed, plan, lengths, draw_weights(lengths)) for plan in range(PLANS)]
        blocks.append(in_tables(plans, lengths, ids_before))
        done, ids_before = done + len(block), ids_before + int(block.sum())
    pieces, counts = zip(*blocks, strict=True)
    return Documents(ids, np.concatenate(pieces), np.stack(counts), lengths)


def joined(*batches):
    """Return the real rows of the batches as tuples of epoch, number and ids."""
    return [
        (*pair, tuple(row))
        for batch in batches
        for pair, row in zip(real_pairs(batch), batch.input_ids[batch.real].tolist(), strict=True)
    ]


@few_examples
@given(document_sizes, st.integers(1, 9), st.integers(1, 3), seeds)
def test_every_row_of_a_plan_occurs_exactly_once_per_epoch(sizes, epochs, n_blocks, seed):
    config = small_config(epochs=epochs, seed=seed)
    documents = documents_of(sizes, config, n_blocks)
    rows = DocumentRows(documents, config)
    seen = [(epoch, number) for epoch, number, _ in joined(*map(rows.batch, range(rows.steps)))]
    plans = np.repeat(np.tile(np.arange(PLANS), n_blocks), documents.counts.sum(axis=2).reshape(-1))  # of each piece
    assert sorted(seen) == [(epoch, n) for epoch in range(epochs) for n in np.flatnonzero(plans == epoch % PLANS)]


@few_examples
@given(document_sizes, st.integers(1, 5), seeds)
def test_batches_have_one_shape_for_each_kind_and_only_the_last_of_a_kind_is_incomplete(sizes, epochs, seed):
    config = small_config(epochs=epochs, seed=seed)
    rows, last = DocumentRows(documents_of(sizes, config), config), {}
    for batch in map(rows.batch, range(rows.steps)):
        n_rows, length = batch.input_ids.shape
        assert n_rows * length == 4 * 32
        is_padded = (batch.input_ids == PAD_ID).any(axis=1)
        assert is_padded.all() or not is_padded.any()
        assert last.get((length, is_padded[0]), True) and batch.real.any()
        last[length, is_padded[0]] = batch.real.all()
        assert (batch.input_ids[:, 0] == CLS_ID).all() and ((batch.input_ids == SEP_ID).sum(axis=1) == 1).all()


def real_labels(batches, seed):
    """Return the labels of the real rows, [B, M], after checking those of the others."""
    labels = []
    for batch in batches:
        masked = mask_batch(batch, seed=seed, probability=0.4, vocab_size=VOCAB_SIZE)
        assert (masked.labels[~batch.real] == IGNORED).all()
        assert masked.labels.shape[1] == n_slots(batch.input_ids.shape[1], 0.4)
        labels.append(masked.labels[batch.real])
    return np.concatenate(labels)


@few_examples
@given(document_sizes, st.integers(1, 3), st.integers(1, 9), seeds)
def test_any_number_of_processes_reads_the_same_rows_and_masks_in_equal_shapes(sizes, epochs, world_size, seed):
    config = small_config(epochs=epochs, seed=seed)
    rows = DocumentRows(documents_of(sizes, config), config)
    for step in range(min(rows.steps, 12)):
        whole = rows.batch(step)
        shares = [rows.batch(step, rank, world_size) for rank in range(world_size)]
        assert joined(*shares) == joined(whole)
        assert len({share.input_ids.shape for share in shares}) == 1

        assert np.array_equal(real_labels(shares, seed), real_labels([whole], seed))


@few_examples
@given(document_sizes, st.integers(1, 5), seeds, st.data())
def test_a_step_does_not_depend_on_the_steps_read_before(sizes, epochs, seed, data):
    config = small_config(epochs=epochs, seed=seed)
    documents = documents_of(sizes, config)
    rows = DocumentRows(documents, config)
    step = data.draw(st.integers(0, rows.steps - 1))
    in_order = [rows.batch(number) for number in range(rows.steps)]
    assert joined(DocumentRows(documents, config).batch(step)) == joined(in_order[step])


def test_the_order_and_the_masks_of_a_row_change_with_the_epoch():
    config = small_config(epochs=2 * PLANS)
    rows = DocumentRows(documents_of([100] * 20, config), config)
    batches = [rows.batch(step) for step in range(rows.steps)]
    order, masks = {}, {}
    for batch in batches:
        masked = mask_batch(batch, seed=1, probability=0.4, vocab_size=VOCAB_SIZE)
        for epoch, number, positions in zip(batch.epochs, batch.sequence_ids, masked.positions, strict=True):
            order.setdefault(int(epoch), []).append(int(number))
            masks.setdefault(int(number), set()).add(tuple(sorted(positions.tolist())))
    assert sorted(order[0]) != sorted(order[1])  # other cuts
    assert order[0] != order[PLANS]  # the same cuts in another order
    assert np.mean([len(of_row) for of_row in masks.values()]) > 1.8  # of 2


def test_what_a_run_has_seen_adds_up_to_its_epochs():
    config = small_config(epochs=3)
    documents = documents_of([5, 70, 333, 1, 18], config)
    rows = DocumentRows(documents, config)
    seen, n_rows, n_tokens = [], 0, 0
    for step in range(rows.steps):
        seen.append(rows.seen(step))
        assert (seen[-1].rows, seen[-1].tokens) == (n_rows, n_tokens)
        batch = rows.batch(step)
        n_rows, n_tokens = n_rows + int(batch.real.sum()), n_tokens + int(batch.real.sum()) * batch.input_ids.shape[1]
    assert [one.epochs for one in seen] == sorted(one.epochs for one in seen)
    assert rows.seen(rows.steps) == rows.seen(rows.steps + 7) == (3.0, n_rows, n_tokens)
    assert n_rows == documents.n_rows[:3].sum()
    steps = rows.steps_of_lengths()
    assert sum(steps.values()) == rows.steps and set(steps) <= set(documents.row_lengths) and all(steps.values())


def test_packed_rows_are_those_of_training_batch():
    sequences, config = as_sequences(token_rows(30)), resolve(configure(batch_size=8, epochs=2, max_seq_len=16))
    rows = PackedRows(sequences, config)
    assert rows.steps == 8 and rows.steps_of_lengths() == {16: 8}
    for step in range(8):
        other = training_batch(
            sequences, step=step, epochs=2, global_batch_size=8, seed=config.seed, rank=1, world_size=2
        )
        for name, value in dataclasses.asdict(rows.batch(step, 1, 2)).items():
            assert np.array_equal(value, getattr(other, name))
    assert rows.seen(3) == (24 / 30, 24, 24 * 16) and rows.seen(8) == (2.0, 60, 60 * 16)


@many_examples
@given(
    st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=5).filter(
        lambda kinds: any(n for n, _ in kinds)
    ),
    seeds,
    st.integers(1, 50),
)
def test_a_mix_has_every_batch_once_in_order_and_evenly_over_the_run(kinds, seed, at_a_time):
    n_batches = [n for n, _ in kinds]
    is_incomplete = np.array([n > 0 and is_last for n, is_last in kinds])
    before, module.STEPS_AT_A_TIME = module.STEPS_AT_A_TIME, at_a_time
    try:
        mix = Mix(np.array(n_batches), seed, is_incomplete)
    finally:
        module.STEPS_AT_A_TIME = before
    assert mix.steps == sum(n_batches)
    order = [mix.batch_of(step) for step in range(mix.steps)]
    for kind, n in enumerate(n_batches):
        assert [number for of, number in order if of == kind] == list(range(n))
    counts = np.zeros(len(n_batches), int)
    for step, (kind, _) in enumerate(order):
        assert np.array_equal(mix.batches_before(step), counts)
        expected = np.array(n_batches) * step / mix.steps
        assert (abs(counts - expected) <= len(n_batches) + 1).all()
        counts[kind] += 1
    assert np.array_equal(mix.batches_before(mix.steps), n_batches)
    whole = Mix(np.array(n_batches), seed, is_incomplete)
    assert [whole.batch_of(step) for step in range(mix.steps)] == order  # whatever is computed at a time
    at_the_end = order[mix.steps - is_incomplete.sum() :]
    assert {kind for kind, _ in at_the_end} == set(np.flatnonzero(is_incomplete))  # with batches that are not full


@pytest.mark.parametrize("n_batches", [[10**9, 3 * 10**8, 1], [10**6]])
def test_a_mix_of_any_size_needs_little_memory(n_batches):
    mix = Mix(np.array(n_batches), 3, np.zeros(len(n_batches), bool))
    step = mix.steps - 10
    kind, number = mix.batch_of(step)
    assert mix.batches_before(step)[kind] == number and mix._before.nbytes < 1e8
