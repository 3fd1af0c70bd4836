"""Modules of both architectures: gathering of positions, padding, rotary positions, dropout."""

import pytest
import torch
from models import VOCAB_SIZE, noisy_model, token_rows

import microbert.model.layers
from microbert.data.tokenizer import N_SPECIAL, PAD_ID
from microbert.model.layers import Dropout, ModelConfig, Rotary, at_positions

ARCHS = ("bert", "modern")


def padded_tokens():
    ids = torch.from_numpy(token_rows(6, seed=1))
    assert (ids == PAD_ID).any()
    return ids, ids != PAD_ID


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_only_the_asked_positions_are_computed_in_the_order_asked(arch):
    model, (ids, real) = noisy_model(arch=arch), padded_tokens()
    everywhere = model.logits(ids, real, torch.arange(16).expand(6, 16)).view(6, 16, -1)
    positions = torch.randint(0, 16, (6, 5), generator=torch.Generator().manual_seed(0))
    asked = model.logits(ids, real, positions).view(6, 5, -1)
    assert torch.allclose(asked, torch.take_along_dim(everywhere, positions[:, :, None], dim=1), atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_tokens_in_the_padding_change_nothing(arch):
    model, (ids, real) = noisy_model(arch=arch), padded_tokens()
    positions = torch.arange(16).expand(6, 16)
    other = torch.where(real, ids, torch.randint_like(ids, N_SPECIAL, VOCAB_SIZE))
    before, after = (model.logits(x, real, positions).view(6, 16, -1) for x in (ids, other))
    assert torch.equal(before[real], after[real])
    assert not torch.equal(before, after)
    without_mask = model.logits(other, None, positions).view(6, 16, -1)
    assert not torch.allclose(before[real], without_mask[real], atol=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_gradient_of_asked_positions_is_that_of_computing_all_positions(arch):
    """The last layer computes only the asked positions, which must not change gradients."""
    ids, real = padded_tokens()
    positions = torch.randint(0, 16, (6, 5), generator=torch.Generator().manual_seed(0))
    gradients = []
    for asked in (positions, torch.arange(16).expand(6, 16)):
        model = noisy_model(n_layers=1, arch=arch)
        hidden = model(ids, real, asked).view(6, -1, 8)
        at_positions(hidden, None if asked is positions else positions).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(*gradients, strict=True))


def test_dropout_is_the_same_if_only_some_positions_are_computed():
    config = ModelConfig(VOCAB_SIZE, 2, 2, 8, 16, dropout=0.3)
    dropout, keys, x = Dropout(config, site=3), torch.arange(4), torch.ones(4, 16, 8)
    positions = torch.randint(0, 16, (4, 5), generator=torch.Generator().manual_seed(0))
    whole, some = dropout(x, keys), dropout(at_positions(x, positions), keys, positions)
    assert torch.equal(at_positions(whole, positions), some)
    assert 0.2 < (whole == 0).float().mean() < 0.4 and not torch.equal(whole, Dropout(config, site=2)(x, keys))


def test_rotary_products_depend_only_on_the_distance():
    rotary = Rotary(ModelConfig(VOCAB_SIZE, 1, 2, 16, 32))
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 32, 2, 8)
    query, key = (rotary(x)[0, :, 0] for x in (query, key))  # [T, d]
    products = query @ key.T
    for distance in (-5, 0, 7):
        along = products.diagonal(distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)
    assert products.diagonal(0)[0] - products.diagonal(7)[0] != pytest.approx(0, abs=1e-2)


def test_rotary_rotates_asked_positions_as_in_the_whole_sequence():
    rotary = Rotary(ModelConfig(VOCAB_SIZE, 1, 2, 16, 32))
    x = torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.randint(0, 32, (3, 5), generator=torch.Generator().manual_seed(1))
    whole = rotary(x.view(3, 32, 2, 8)).flatten(2)
    assert torch.equal(
        at_positions(whole, positions), rotary(at_positions(x, positions).view(3, 5, 2, 8), positions).flatten(2)
    )


def test_extended_rotary_tables_equal_those_built_in_advance(monkeypatch):
    (ids, real), positions = padded_tokens(), torch.tensor([[15, 3, 7]]).expand(6, 3)
    at_once = noisy_model(arch="modern")
    expected = at_once.logits(ids, real, positions)
    monkeypatch.setattr(microbert.model.layers, "TABLE_NUMBERS", 12)
    growing = noisy_model(arch="modern")
    table = growing.layers[0].attention.rotary
    assert len(table.cos) == 3
    assert torch.equal(growing.logits(ids, real, positions), expected)
    for name, buffer in table.named_buffers():
        assert torch.equal(buffer, at_once.layers[0].attention.rotary.get_buffer(name))
