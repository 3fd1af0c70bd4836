"""Lengths of training rows, and the number of rows of each length in a step and a micro-batch."""

import dataclasses

import pytest
from configs import configure, configure_v4, resolve
from hypothesis import given
from hypothesis import strategies as st

from microbert.config.constants import resolve_batch_size
from microbert.data.row_lengths import (
    DRAWN_SHARES,
    describe_step,
    draw_weights,
    most_positions,
    row_lengths,
    rows_at_a_time,
    rows_of_process,
    rows_of_step,
    usual_shares,
)

STANDARD = (8, 16, 32, 64, 128, 256, 512)


@pytest.mark.parametrize(
    "constants, lengths",
    [
        ({}, STANDARD),
        ({"max_seq_len": 64}, STANDARD),
        ({"max_seq_len": 700}, (*STANDARD, 700)),
        ({"arch": "bert"}, STANDARD[:5]),
        ({"arch": "bert", "max_seq_len": 100}, (8, 16, 32, 64, 100)),
        ({"arch": "bert", "max_seq_len": 5}, (5,)),
        ({"rows": "packed"}, (128,)),
    ],
)
def test_rotary_models_have_rows_of_512_tokens_and_others_of_max_seq_len(constants, lengths):
    config = configure_v4(**constants)
    assert row_lengths(config) == lengths and most_positions(config) == lengths[-1]
    assert len(draw_weights(lengths)) == len(lengths)


def test_packed_rows_have_max_seq_len_tokens():
    config = resolve(configure())
    assert (row_lengths(config), rows_of_step(config), rows_of_process(config)) == ((128,), {128: 32}, {128: 32})
    assert describe_step(config) == "32 sequences"


def test_weights_are_shares_of_the_tokens():
    assert draw_weights(STANDARD) == [DRAWN_SHARES[length] / length for length in STANDARD]
    assert draw_weights((8, 100, 1024)) == [DRAWN_SHARES[8] / 8, DRAWN_SHARES[128] / 100, DRAWN_SHARES[512] / 1024]


def test_the_expected_shares_are_of_all_tokens():
    for lengths in (STANDARD, (8, 100), (3,), (*STANDARD, 1024)):
        shares = usual_shares(lengths)
        assert sum(shares) == pytest.approx(1) and len(shares) == len(lengths) and min(shares) > 0


def test_a_step_has_batch_size_times_max_seq_len_tokens_at_every_length():
    config = resolve(configure_v4(), n_layers=4, batch_size=32)
    assert rows_of_step(config) == {8: 512, 16: 256, 32: 128, 64: 64, 128: 32, 256: 16, 512: 8}
    assert describe_step(config) == "4,096 tokens"


def test_a_step_has_at_least_one_row_and_each_process_too():
    config = resolve_batch_size(configure_v4(n_layers=1, batch_size=1, max_seq_len=32), 4)
    assert rows_of_step(config) == {8: 16, 16: 8, 32: 4, 64: 2, 128: 1, 256: 1, 512: 1}
    assert rows_of_process(config) == {8: 4, 16: 2, 32: 1, 64: 1, 128: 1, 256: 1, 512: 1}


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8), st.sampled_from([8, 100, 128, 700]))
def test_a_step_has_as_many_micro_batches_at_every_length(batch_size, micro_batch_size, n_processes, max_seq_len):
    config = configure_v4(n_layers=1, batch_size=batch_size, max_seq_len=max_seq_len)
    config = resolve_batch_size(config, n_processes)
    micro_batch_size = min(micro_batch_size, batch_size)
    n_parts = -(-batch_size // micro_batch_size)
    for n_rows in rows_of_process(config).values():
        size = rows_at_a_time(n_rows, micro_batch_size, config)
        assert 1 <= size <= n_rows and -(-n_rows // size) <= n_parts
    packed = dataclasses.replace(config, rows="packed")
    assert rows_at_a_time(batch_size, micro_batch_size, packed) == micro_batch_size
