"""The parameter groups, and what the optimizers do."""

import math

import pytest
import torch
from configs import configure
from models import noisy_model
from torch import nn

from microbert.train.optim import (
    ADAMW,
    MUON,
    NO_DECAY,
    Muon,
    Optimizer,
    orthogonalise,
    parameter_groups,
)

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
def test_muon_has_the_hidden_matrices_and_biases_and_norms_do_not_decay(arch, optimizer):
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
def test_the_optimizer_uses_weight_decay(optimizer):
    members = Optimizer(noisy_model(), configure(weight_decay=0.3, optimizer=optimizer)).members
    assert (
        sorted(group["weight_decay"] for member in members for group in member.param_groups)
        == [0.0, 0.3, 0.3][: 1 + len(members)]
    )


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4)])
def test_muon_matches_torchs_muon(shape):
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
    assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()  # torch's Muon iterates in bf16


def test_stacked_matrices_are_updated_separately():
    stacked, *alone = (nn.Parameter(torch.zeros(rows, 5)) for rows in (9, 3, 3, 3))
    stacked.grad = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    for parameter, gradient in zip(alone, stacked.grad.chunk(3), strict=True):
        parameter.grad = gradient.clone()
    for members in ({stacked: 3}, dict.fromkeys(alone, 1)):
        muon = Muon(members, weight_decay=0.0)
        muon.found_inf, muon.param_groups[0]["lr"] = FINE, 0.1
        muon.step()
    assert torch.allclose(stacked, torch.cat(alone), atol=1e-6) and stacked.any()


def test_orthogonalised_matrices_have_singular_values_near_1():
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
def test_an_optimizer_resumes_bitwise_from_its_tensors(arch, optimizer):
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
