"""Which parameters decay, and the learning rate over a run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import many_examples, noisy_bert
from test_config import configure
from torch import nn

from microbert.config import peak_learning_rate
from microbert.optim import build_optimizer, learning_rate_share, parameter_groups, reach

totals = st.integers(1, 2000)
ratios = st.floats(0, 1, exclude_max=True)


def shares(total, ratio):
    return [learning_rate_share(step, total, ratio) for step in range(total)]


def test_every_parameter_is_in_exactly_one_group():
    model = noisy_bert()
    grouped = [id(parameter) for group in parameter_groups(model, 0.01) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_matrices_decay_and_biases_and_norms_do_not():
    model = noisy_bert()
    decay = {id(parameter): group["weight_decay"] for group in parameter_groups(model, 0.01) for parameter in group["params"]}
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    assert norms
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("bias") or id(parameter) in norms else 0.01), name


def test_the_optimizer_gets_the_peak_and_the_decay_of_the_constants():
    optimizer = build_optimizer(noisy_bert(), configure(weight_decay=0.3, learning_rate=0.002, lr_scaling="none"))
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.3]
    assert {group["lr"] for group in optimizer.param_groups} == {0.002}


@many_examples
@given(totals, ratios)
def test_the_learning_rate_peaks_at_1_and_is_never_below_0(total, ratio):
    values = shares(total, ratio)
    assert max(values) == 1.0 and min(values) > 0
    assert learning_rate_share(total, total, ratio) == 0  # where the run is over


@many_examples
@given(totals, ratios)
def test_the_learning_rate_rises_linearly_then_falls_linearly_towards_0(total, ratio):
    values = shares(total, ratio)
    warmup = values.index(1.0)
    assert warmup == int(total * ratio)
    rise, fall = 1 / (warmup + 1), 1 / (total - warmup)
    for step in range(total):
        assert values[step] == pytest.approx((step + 1) * rise if step <= warmup else 1 - (step - warmup) * fall, abs=1e-9)
    assert values[-1] == pytest.approx(fall)


@many_examples
@given(totals, ratios)
def test_the_reach_is_the_sum_of_all_learning_rates(total, ratio):
    config = configure(lr_scaling="none", learning_rate=0.5, warmup_ratio=ratio)
    assert reach(config, total) == pytest.approx(0.5 * math.fsum(shares(total, ratio)))


def test_v1_peaks_at_its_documented_learning_rate():
    assert peak_learning_rate(configure()) == pytest.approx(9.6e-3)


@pytest.mark.parametrize("changed, factor", [({"n_embed": 8}, 0.5), ({"batch_size": 128}, 2), ({"max_seq_len": 32}, 0.5),
                                             ({"learning_rate": 1e-4}, 2), ({"n_embed": 768}, 4 / 768)])
def test_the_peak_goes_with_width_and_tokens_a_step(changed, factor):
    assert peak_learning_rate(configure(**changed)) == pytest.approx(9.6e-3 * factor)


def test_without_scaling_the_peak_is_the_constant():
    assert peak_learning_rate(configure(lr_scaling="none", n_embed=64, batch_size=7)) == 5e-5
