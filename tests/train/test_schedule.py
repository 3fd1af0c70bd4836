"""The learning rate over a run, and its peak."""

import dataclasses
import math

import pytest
from configs import configure, resolve
from hypothesis import given
from hypothesis import strategies as st
from models import many_examples

from microbert.config.learning_rate import peak_learning_rate
from microbert.train.schedule import learning_rate_share, sum_of_learning_rates

totals = st.integers(1, 2000)
ratios = st.floats(0, 0.99)
schedules = st.sampled_from(["linear", "wsd"])


def shares(total, config):
    return [learning_rate_share(step, total, config) for step in range(total)]


def scheduled(schedule, ratio, decay=0.5):
    return resolve(configure(schedule=schedule, warmup_ratio=ratio, decay_ratio=min(decay, 1 - ratio)))


@many_examples
@given(totals, ratios, schedules)
def test_the_learning_rate_peaks_at_1_and_is_never_below_0(total, ratio, schedule):
    config = scheduled(schedule, ratio)
    values = shares(total, config)
    assert max(values) == 1.0 and min(values) > 0
    assert learning_rate_share(total, total, config) == 0  # at the end of the run


@many_examples
@given(totals, ratios, st.floats(0.01, 1), schedules)
def test_the_learning_rate_rises_and_decays_linearly(total, ratio, decay, schedule):
    config = scheduled(schedule, ratio, decay)
    values = shares(total, config)
    warmup = values.index(1.0)
    assert warmup == int(total * ratio)
    falling = total - warmup if schedule == "linear" else max(1, int(total * config.decay_ratio))
    rise, fall = 1 / (warmup + 1), 1 / falling
    for step in range(total):
        assert values[step] == pytest.approx(
            (step + 1) * rise if step <= warmup else min(1, (total - step) * fall), abs=1e-9
        )
    assert values[-1] == pytest.approx(fall)


@many_examples
@given(totals, ratios, st.floats(0.001, 1), schedules)
def test_the_sum_of_learning_rates_is_exact(total, ratio, decay, schedule):
    config = dataclasses.replace(scheduled(schedule, ratio, decay), lr_scaling="none", learning_rate=0.5)
    assert sum_of_learning_rates(config, total) == pytest.approx(0.5 * math.fsum(shares(total, config)), rel=1e-12)


def test_the_sum_over_any_number_of_steps_takes_no_loop():
    config = dataclasses.replace(scheduled("wsd", 0.1, 0.3), lr_scaling="none", learning_rate=1.0)
    assert sum_of_learning_rates(config, 10**15) == pytest.approx(0.8e15)  # a loop would take a year


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.35, 0.58, 0.7, 0.8, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 97, 1000])
def test_ratios_whose_sum_is_1_cover_every_step_once(total, warmup, schedule):
    config = scheduled(schedule, warmup, round(1 - warmup, 3))
    values = shares(total, config)
    top = values.index(1.0)
    assert all(0 < value <= 1 for value in values)
    assert values[:top] == sorted(values[:top]) and values[top:] == sorted(values[top:], reverse=True)
    for position in (
        -1e-3,
        0.5,
        top + 0.5,
        total - 1e-9,
        total,
        total + 1,
    ):  # positions between steps, as with max_minutes
        assert 0 <= learning_rate_share(position, total, config) <= 1
    assert sum_of_learning_rates(config, total) == pytest.approx(
        peak_learning_rate(config) * math.fsum(values), rel=1e-12
    )


def peak(**changed):
    return peak_learning_rate(resolve(configure(**changed)))


def test_v1_peaks_at_its_documented_learning_rate():
    assert peak() == pytest.approx(2.38e-2, rel=1e-3)


@pytest.mark.parametrize(
    "changed, factor",
    [
        ({"n_embed": 64}, 0.5),
        ({"batch_size": 128}, 2),
        ({"max_seq_len": 32}, 0.5),
        ({"learning_rate": 1e-4}, 2),
        ({"n_embed": 1024}, 0.25),
    ],
)
def test_the_peak_depends_on_width_and_tokens_per_step(changed, factor):
    assert peak(**changed) == pytest.approx(peak() * factor)


def test_without_scaling_the_peak_is_the_constant():
    assert peak(lr_scaling="none", n_embed=64, batch_size=7) == 5e-5
