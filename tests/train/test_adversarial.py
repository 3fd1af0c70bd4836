"""The adversarial change raises the loss more than any other change of its size, and is gone afterwards."""

import pytest
import torch
from models import noisy_model, token_rows
from torch.nn.functional import cross_entropy

from microbert.data.tokenizer import PAD_ID
from microbert.model.classifier import TextClassifier
from microbert.train.adversarial import EmbeddingChange

SIZE = 0.01


@pytest.fixture(params=["bert", "modern"])
def model(request):
    return TextClassifier(noisy_model(arch=request.param), 2, seed=0)


@pytest.fixture
def batch():
    rows = torch.from_numpy(token_rows(6))
    return rows, torch.arange(6) % 2


def loss_of(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("frozen", [False, True])
def test_it_raises_the_loss_and_is_as_large_as_asked(model, batch, frozen):
    model.encoder.embeddings.requires_grad_(not frozen)
    change = EmbeddingChange(model.encoder.embeddings, SIZE)
    before = loss_of(model, batch)
    before.backward()
    plain = model.encoder.embeddings(batch[0], None).detach()
    loss_of(model, batch).backward()
    with change.against():
        changed = model.encoder.embeddings(batch[0], None).detach()
        after = loss_of(model, batch)
    is_real = (batch[0] != PAD_ID)[:, :, None]
    added = (changed - plain).flatten(1).norm(dim=1)
    torch.testing.assert_close(added, SIZE * (plain * is_real).flatten(1).norm(dim=1))
    assert after > before
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):  # in any other direction the loss rises less
        other = torch.randn(plain.shape, generator=generator) * is_real
        change._change = other * (added / other.flatten(1).norm(dim=1))[:, None, None]
        assert loss_of(model, batch) < after
    change._change = None
    assert loss_of(model, batch) == before


def test_the_change_of_a_text_does_not_depend_on_its_padding(model):
    long, short = torch.from_numpy(token_rows(2)), 5
    long[0, short:], long[1, 10:] = PAD_ID, 7
    embeddings, found = model.encoder.embeddings, []
    change = EmbeddingChange(embeddings, SIZE)
    for rows in (long[:1, :short], long):
        plain = embeddings(rows, None).detach()
        loss_of(model, (rows, torch.arange(len(rows)) % 2)).backward()
        with change.against():
            found.append((embeddings(rows, None) - plain)[0].detach())
    alone, padded = found
    assert alone.norm() > 0 and not padded[short:].any()
    torch.testing.assert_close(padded[:short], alone, rtol=1e-3, atol=1e-5)


def test_it_changes_nothing_where_nothing_is_learnt_and_after_its_removal(model, batch):
    change = EmbeddingChange(model.encoder.embeddings, SIZE)
    with torch.no_grad():
        loss = loss_of(model, batch)
    loss_of(model, batch).backward()
    change.remove()
    with change.against():
        assert loss_of(model, batch) == loss
    assert not model.encoder.embeddings._forward_hooks
