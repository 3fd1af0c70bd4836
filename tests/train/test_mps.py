"""Apple's GPUs have no float64, and torch's fused AdamW ignores `found_inf` on them.

These tests run on a CPU without our kernels instead.
"""

import math

import numpy as np
import pytest
import torch
from configs import configure, resolve
from models import VOCAB_SIZE, as_batch, as_sequences, noisy_model, token_rows
from test_optim import BROKEN, FINE, parameters_after, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

import microbert.train.optim
from microbert.data.masking import mask_batch
from microbert.runtime.distributed import World
from microbert.runtime.run import Run
from microbert.train.held_out import evaluate
from microbert.train.optim import GuardedAdamW, Optimizer
from microbert.train.step import Learner

RECIPES = [(arch, optimizer) for arch in ("bert", "modern") for optimizer in ("adamw", "muon")]


class NoFloat64(TorchDispatchMode):
    """Fail if an operation returns float64, except `torch.tensor`, which is used for numbers that stay on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and function is not torch.ops.aten.lift_fresh.default:
                assert x.dtype != torch.float64, function
        return result


@pytest.fixture
def on_apple(monkeypatch):
    monkeypatch.setattr(microbert.train.optim, "FUSED", ())
    for module in ("model.loss", "kernels.norm", "kernels.gelu", "kernels.attention"):
        monkeypatch.setattr(f"microbert.{module}.is_for_kernels", lambda *_: False)


def optimizer_of(name):
    model = noisy_model()
    return model, Optimizer(model, configure(optimizer=name, weight_decay=0.1))


@pytest.mark.parametrize("arch, optimizer", RECIPES)
def test_training_and_evaluation_create_no_float64_on_the_device(arch, optimizer, on_apple, monkeypatch, tmp_path):
    # try_gather works on the CPU
    monkeypatch.setattr(World, "try_gather", lambda _, *values: (np.array([values], np.float64), []))
    config = resolve(configure(optimizer=optimizer, arch=arch, dropout=0.1, batch_size=8))
    learner = Learner(noisy_model(arch=arch, dropout=0.1), config, World.alone())
    rows = token_rows(8)
    with NoFloat64():
        for number in range(2):
            masked = mask_batch(as_batch(rows), seed=number, probability=0.3, vocab_size=VOCAB_SIZE)
            loss, _ = learner.step(masked, number, 1e-2).read()
            assert math.isfinite(loss)
        run = Run(config, tmp_path)
        run.config = config
        result, _ = evaluate(learner, as_sequences(rows), run)
    assert math.isfinite(result.loss)
    assert isinstance(learner.optimizer.members[0], GuardedAdamW)


def test_guarded_adamw_allocates_before_it_changes_anything(on_apple, monkeypatch):
    model, optimizer = optimizer_of("adamw")
    with_gradients(model, 0)
    (member,) = optimizer.members
    member.found_inf, before = FINE, parameters_after(model)
    for group in member.param_groups:
        group["lr"] = 1e-2
    change = member.prepare()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    monkeypatch.delattr(torch, "zeros_like")
    monkeypatch.delattr(torch, "empty_like")
    change()
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_guarded_adamw_matches_torchs_adamw(on_apple, monkeypatch):
    ours, guarded = optimizer_of("adamw")
    monkeypatch.undo()
    theirs, fused = optimizer_of("adamw")
    assert not isinstance(fused.members[0], GuardedAdamW)
    for seed in range(5):
        for model, optimizer in ((ours, guarded), (theirs, fused)):
            with_gradients(model, seed)
            optimizer.step(1e-2, FINE)
    before = parameters_after(noisy_model())
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert not torch.allclose(parameter, before[name], atol=1e-2)
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6)
    for name, moment in guarded.tensors().items():
        torch.testing.assert_close(moment, fused.tensors()[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n_steps", [0, 1])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_broken_step_changes_nothing_and_does_not_affect_the_next_one(name, n_steps, on_apple):
    (model, optimizer), (other, undisturbed) = optimizer_of(name), optimizer_of(name)
    for _ in range(n_steps):
        for one, its in ((model, optimizer), (other, undisturbed)):
            with_gradients(one)
            its.step(1e-2, FINE)
    weights, moments = parameters_after(model), {key: tensor.clone() for key, tensor in optimizer.tensors().items()}
    for value in (math.nan, math.inf):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step(1e-2, BROKEN)
    assert all(torch.equal(weights[key], parameter) for key, parameter in model.named_parameters())
    assert all(torch.equal(moment, optimizer.tensors()[key]) for key, moment in moments.items())
    for one, its in ((model, optimizer), (other, undisturbed)):
        with_gradients(one, seed=1)
        its.step(1e-2, FINE)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
