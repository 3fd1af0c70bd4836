"""Which parameters go to which optimizer, what Muon does, and the learning rate over a run."""

import math

import pytest
import torch
from configs import configure
from hypothesis import given
from hypothesis import strategies as st
from models import many_examples, noisy_model
from torch import nn

from microbert.config.learning_rate import peak_learning_rate
from microbert.train.optim import (
    ADAMW,
    MUON,
    NO_DECAY,
    Muon,
    Optimizer,
    learning_rate_share,
    orthogonalise,
    parameter_groups,
    reach,
)

totals = st.integers(1, 2000)
ratios = st.floats(0, 0.99)
schedules = st.sampled_from(["linear", "wsd"])
RECIPES = [(arch, optimizer) for arch in ("bert", "modern") for optimizer in ("adamw", "muon")]
FINE, BROKEN = torch.zeros(()), torch.ones(())


def with_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def parameters_after(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("arch, optimizer", RECIPES)
def test_every_parameter_is_in_exactly_one_group(arch, optimizer):
    model = noisy_model(arch=arch)
    grouped = [id(parameter) for group in parameter_groups(model, optimizer).values() for parameter in group.values()]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    learner = Optimizer(model, configure(optimizer=optimizer))
    grouped = [
        id(parameter) for member in learner.members for group in member.param_groups for parameter in group["params"]
    ]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("arch, optimizer", RECIPES)
def test_hidden_matrices_are_muons_and_biases_and_norms_do_not_decay(arch, optimizer):
    model = noisy_model(arch=arch)
    groups = parameter_groups(model, optimizer)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert norms
    for name in dict(model.named_parameters()):
        module, kind = name.rsplit(".", 1)
        expected = (
            NO_DECAY
            if kind == "bias" or module in norms
            else ADAMW
            if optimizer == "adamw" or module.startswith("embeddings")
            else MUON
        )
        assert name in groups[expected], name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_gets_the_decay_of_the_constants(optimizer):
    members = Optimizer(noisy_model(), configure(weight_decay=0.3, optimizer=optimizer)).members
    assert (
        sorted(group["weight_decay"] for member in members for group in member.param_groups)
        == [0.0, 0.3, 0.3][: 1 + len(members)]
    )


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4)])
def test_muon_does_what_torchs_muon_does(shape):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    muon = Muon({ours: 1}, weight_decay=0.1)
    muon.found_inf, muon.param_groups[0]["lr"] = FINE, 0.02
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()  # torch's iterates in bf16


def test_matrices_over_each_other_are_updated_each_for_itself():
    stacked, *alone = (nn.Parameter(torch.zeros(rows, 5)) for rows in (9, 3, 3, 3))
    stacked.grad = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    for parameter, gradient in zip(alone, stacked.grad.chunk(3)):
        parameter.grad = gradient.clone()
    for members in ({stacked: 3}, dict.fromkeys(alone, 1)):
        muon = Muon(members, weight_decay=0.0)
        muon.found_inf, muon.param_groups[0]["lr"] = FINE, 0.1
        muon.step()
    assert torch.allclose(stacked, torch.cat(alone), atol=1e-6) and stacked.any()


def test_an_orthogonalised_matrix_moves_all_directions_about_alike():
    matrices = (
        torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    )
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("arch, optimizer", RECIPES)
def test_a_broken_step_changes_neither_weights_nor_moments(arch, optimizer):
    model = noisy_model(arch=arch)
    learner = Optimizer(model, configure(optimizer=optimizer))
    with_gradients(model)
    learner.step(1e-2, FINE)
    before, moments = parameters_after(model), {name: tensor.clone() for name, tensor in learner.tensors().items()}
    for parameter in model.parameters():
        parameter.grad.fill_(math.nan)
    learner.step(1e-2, BROKEN)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(torch.equal(moments[name], tensor) for name, tensor in learner.tensors().items())


@pytest.mark.parametrize("arch, optimizer", RECIPES)
def test_an_optimizer_goes_on_bitwise_from_its_tensors(arch, optimizer):
    def new():
        model = noisy_model(arch=arch)
        return model, Optimizer(model, configure(optimizer=optimizer))

    whole, first = new()
    for seed in range(3):
        with_gradients(whole, seed)
        first.step(1e-2, FINE)
        if seed == 1:
            weights, moments = (
                parameters_after(whole),
                {name: tensor.clone() for name, tensor in first.tensors().items()},
            )
    resumed, second = new()
    assert not second.tensors()
    second.begin_after(2)
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            parameter.copy_(weights[name])
        for name, tensor in second.tensors().items():
            tensor.copy_(moments[name])
    assert second.tensors().keys() == moments.keys()
    with_gradients(resumed, 2)
    second.step(1e-2, FINE)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def shares(total, config):
    return [learning_rate_share(step, total, config) for step in range(total)]


def scheduled(schedule, ratio, decay=0.5):
    return configure(schedule=schedule, warmup_ratio=ratio, decay_ratio=min(decay, 1 - ratio))


@many_examples
@given(totals, ratios, schedules)
def test_the_learning_rate_peaks_at_1_and_is_never_below_0(total, ratio, schedule):
    config = scheduled(schedule, ratio)
    values = shares(total, config)
    assert max(values) == 1.0 and min(values) > 0
    assert learning_rate_share(total, total, config) == 0  # where the run is over


@many_examples
@given(totals, ratios, st.floats(0.01, 1), schedules)
def test_the_learning_rate_rises_linearly_holds_and_falls_linearly_towards_0(total, ratio, decay, schedule):
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
def test_the_reach_is_the_sum_of_all_learning_rates(total, ratio, decay, schedule):
    config = configure(
        lr_scaling="none", learning_rate=0.5, schedule=schedule, warmup_ratio=ratio, decay_ratio=min(decay, 1 - ratio)
    )
    assert reach(config, total) == pytest.approx(0.5 * math.fsum(shares(total, config)), rel=1e-12)


def test_the_reach_of_any_number_of_steps_is_there_at_once():
    config = configure(lr_scaling="none", learning_rate=1.0, schedule="wsd", warmup_ratio=0.1, decay_ratio=0.3)
    assert reach(config, 10**15) == pytest.approx(0.8e15)  # by a loop it would take a year


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.35, 0.58, 0.7, 0.8, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 97, 1000])
def test_ratios_whose_sum_is_1_leave_no_step_out_and_take_none_twice(total, warmup, schedule):
    config = configure(schedule=schedule, warmup_ratio=warmup, decay_ratio=round(1 - warmup, 3))
    values = shares(total, config)
    top = values.index(1.0)
    assert all(0 < value <= 1 for value in values)
    assert values[:top] == sorted(values[:top]) and values[top:] == sorted(values[top:], reverse=True)
    for position in (-1e-3, 0.5, top + 0.5, total - 1e-9, total, total + 1):  # as max_minutes gives them
        assert 0 <= learning_rate_share(position, total, config) <= 1
    assert reach(config, total) == pytest.approx(peak_learning_rate(config) * math.fsum(values), rel=1e-12)


def test_v1_peaks_at_its_documented_learning_rate():
    assert peak_learning_rate(configure()) == pytest.approx(2.38e-2, rel=1e-3)


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
def test_the_peak_goes_with_width_and_tokens_a_step(changed, factor):
    assert peak_learning_rate(configure(**changed)) == pytest.approx(peak_learning_rate(configure()) * factor)


def test_without_scaling_the_peak_is_the_constant():
    assert peak_learning_rate(configure(lr_scaling="none", n_embed=64, batch_size=7)) == 5e-5
