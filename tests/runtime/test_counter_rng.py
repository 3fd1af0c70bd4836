"""Counter-based random numbers: bijective, independent of grouping and order, uniform."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import few_examples, many_examples

from microbert.runtime.counter_rng import permute, random_bits, uniform

sizes = st.integers(1, 3000)
counters = st.integers(0, 2**63 - 1)


@many_examples
@given(sizes, counters, counters)
def test_permute_gives_every_place_once(n, seed, epoch):
    assert (np.sort(permute(np.arange(n), n, seed, epoch)) == np.arange(n)).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 4095, 4096, 4097])
def test_permute_gives_every_place_once_around_powers_of_two(n):
    assert (np.sort(permute(np.arange(n), n, 42, 0)) == np.arange(n)).all()


@many_examples
@given(st.data(), sizes, counters)
def test_a_place_does_not_depend_on_the_other_indices_or_their_order(data, n, seed):
    whole = permute(np.arange(n), n, seed)
    asked = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    assert (permute(asked, n, seed) == whole[asked]).all()
    cut = data.draw(st.integers(0, len(asked)))
    assert (np.concatenate([permute(asked[:cut], n, seed), permute(asked[cut:], n, seed)]) == whole[asked]).all()
    assert (permute(asked[:, None], n, seed)[:, 0] == whole[asked]).all()


@few_examples
@given(sizes, counters)
def test_each_index_may_have_its_own_epoch(n, seed):
    epochs = np.arange(n) % 3
    expected = np.choose(epochs, [permute(np.arange(n), n, seed, epoch) for epoch in range(3)])
    assert (permute(np.arange(n), n, seed, epochs) == expected).all()


@few_examples
@given(st.integers(200, 3000), counters, counters)
def test_another_seed_or_epoch_gives_another_permutation(n, seed, epoch):
    places = permute(np.arange(n), n, seed, epoch)
    for other in (permute(np.arange(n), n, seed ^ 1, epoch), permute(np.arange(n), n, seed, epoch ^ 1), np.arange(n)):
        assert (places == other).mean() < 0.1  # two random permutations agree at about one place


def test_each_index_gets_each_place_about_equally_often():
    n, n_permutations = 10, 5000
    places = permute(np.tile(np.arange(n), (n_permutations, 1)), n, np.arange(n_permutations)[:, None])
    counts = np.array([np.bincount(places[:, index], minlength=n) for index in range(n)])
    assert abs(counts - n_permutations / n).max() < 6 * np.sqrt(n_permutations / n)


@many_examples
@given(st.lists(counters, min_size=1, max_size=5), st.data())
def test_each_counter_and_each_of_its_bits_changes_the_bits(values, data):
    position, bit = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, 62))
    changed = [value ^ (1 << bit) if place == position else value for place, value in enumerate(values)]
    difference = int(random_bits(*values)[0] ^ random_bits(*changed)[0])
    assert 10 <= difference.bit_count() <= 54  # 64 / 2, plus or minus 5.5 standard deviations


def test_the_order_and_number_of_counters_matter():
    assert (
        len({int(random_bits(*values)[0]) for values in [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (3,), (1,), (2,)]}) == 7
    )


@many_examples
@given(counters, st.lists(counters, min_size=1, max_size=8), st.lists(counters, min_size=1, max_size=8))
def test_arrays_of_counters_are_broadcast(seed, rows, columns):
    bits = random_bits(seed, np.array(rows)[:, None], np.array(columns))
    assert bits.shape == (len(rows), len(columns))
    assert all(
        bits[i, j] == random_bits(seed, row, column)[0]
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    )


@few_examples
@given(counters)
def test_uniform_is_uniform(seed):
    n = 20_000
    numbers = uniform(random_bits(seed, np.arange(n)))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert abs(counts - n / 20).max() < 6 * np.sqrt(n / 20)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 6 / np.sqrt(n)


def test_uniform_stays_below_1_and_starts_at_0():
    ends = uniform(np.array([0, 2**64 - 1], np.uint64))
    assert ends[0] == 0 and 0.999 < ends[1] < 1
