"""The loss is cross-entropy over masked tokens, however it is split into chunks and micro-batches."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from configs import configure
from helpers import ROOT, TIME_LIMIT
from hypothesis import given
from hypothesis import strategies as st
from models import VOCAB_SIZE, as_batch, many_examples, noisy_model, on_threads, token_rows
from torch.nn import functional as F

from microbert.data.masking import IGNORED, mask_batch
from microbert.model import loss as loss_module
from microbert.model.loss import SOURCE, THIN, masked_loss, masked_scores
from microbert.runtime.distributed import World
from microbert.train.step import Learner, micro_batches

N, V = 23, 50  # V is not a multiple of LANES
KERNEL, TORCH, COMPILED = "loss.c", "PyTorch", "torch.compile"
WAYS = {
    "thin": (6, KERNEL),
    "thinnest": (1, KERNEL),
    "wide": (40, KERNEL),
    "thin, by PyTorch": (6, TORCH),
    "wide, by PyTorch": (40, TORCH),
    "wide, for torch.compile": (40, COMPILED),
}  # D, and what computes it
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-6}, torch.float64: {"rtol": 1e-11, "atol": 1e-13}}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def n_embed(request, monkeypatch):
    D, way = request.param
    assert (D <= THIN) == (D < 40)
    if way != KERNEL:
        monkeypatch.setattr(loss_module, "compiled_kernel", lambda _: None)
        if way == COMPILED:
            monkeypatch.setattr(loss_module, "_TorchSoftmax", lambda bias, _: loss_module._CompiledSoftmax(bias, False))
            # not compiled here: that takes seconds for each shape
            monkeypatch.setattr(loss_module, "_compiled_softmax", lambda _: loss_module._softmax)
    elif loss_module.compiled_kernel(SOURCE) is None:
        pytest.skip("no C compiler with OpenMP")
    return D


def inputs(dtype=torch.float32, scale=1.0, n_embed=6):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        scale * torch.randn(shape, generator=generator, dtype=dtype) for shape in ((N, n_embed), (V, n_embed), (V,))
    )
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::4] = IGNORED
    return [tensor.requires_grad_() for tensor in (hidden, weight, bias)], labels


def in_chunks_of(monkeypatch, elements):
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", elements)
    for name in ("LEAST_ROWS", "LEAST_ROWS_WIDE"):
        monkeypatch.setattr(loss_module, name, 1)


def loss_and_gradients(function, leaves):
    loss = function(*leaves)
    return loss.detach(), torch.autograd.grad(2.5 * loss, leaves)


def expected(leaves, labels, n_masked):
    def loss(hidden, weight, bias):
        return F.cross_entropy(hidden @ weight.T + bias, labels, ignore_index=IGNORED, reduction="sum") / n_masked

    return loss_and_gradients(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_elements", [1, 5 * V, 23 * V, 10**6])
def test_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, n_embed, chunk_elements, dtype):
    in_chunks_of(monkeypatch, chunk_elements)
    leaves, labels = inputs(dtype, n_embed=n_embed)
    torch.testing.assert_close(
        loss_and_gradients(lambda *x: masked_loss(*x, labels, 17), leaves),
        expected(leaves, labels, 17),
        **TOLERANCE[dtype],
    )


def in_dtype(*leaves, labels, dtype, is_compiled=False):
    return masked_loss(*leaves, labels, 17, dtype, is_compiled)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_gives_the_same_loss_and_gradients(precompiled_headers, monkeypatch, dtype):
    monkeypatch.setattr(loss_module, "compiled_kernel", lambda _: None)
    in_chunks_of(monkeypatch, 8 * V)
    leaves, labels = inputs(n_embed=40)
    (loss, gradients), (expected_loss, expected_gradients) = (
        loss_and_gradients(functools.partial(in_dtype, labels=labels, dtype=dtype, is_compiled=is_compiled), leaves)
        for is_compiled in (True, False)
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert loss == pytest.approx(expected_loss.item(), rel=tolerance)
    assert all(
        (gradient - other).norm() <= tolerance * other.norm()
        for gradient, other in zip(gradients, expected_gradients, strict=True)
    )


@given(chunk=st.integers(1, 3000), n_rows=st.integers(0, 20_000))
def test_compiled_chunks_have_one_size_if_that_makes_few_more(chunk, n_rows):
    even = loss_module._even_chunk(chunk, n_rows)
    n_chunks, least = -(-n_rows // even), -(-n_rows // chunk)
    assert 1 <= even <= chunk and least <= n_chunks and (n_chunks < 2 * least or n_rows == 0)


@many_examples
@given(
    n_rows=st.integers(1, 40),
    vocab_size=st.integers(2, 100),
    n_embed=st.integers(1, 40),
    n_threads=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_any_sizes_and_threads_give_the_loss_and_gradients_of_cross_entropy(
    n_rows, vocab_size, n_embed, n_threads, seed
):
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((n_rows, n_embed), (vocab_size, n_embed), (vocab_size,))
    ]
    labels = torch.randint(0, vocab_size, (n_rows,), generator=generator)
    labels[torch.rand(n_rows, generator=generator) < 0.3] = IGNORED
    results = [
        on_threads(n_threads, loss_and_gradients, lambda *x: masked_loss(*x, labels, n_rows), leaves) for _ in range(2)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], expected(leaves, labels, n_rows), rtol=1e-4, atol=1e-5)


def test_products_in_bf16_give_nearly_the_same_loss_and_gradients(monkeypatch, n_embed):
    in_chunks_of(monkeypatch, 5 * V)
    leaves, labels = inputs(scale=0.5, n_embed=n_embed)
    (loss, gradients), (exact_loss, exact) = (
        loss_and_gradients(functools.partial(in_dtype, labels=labels, dtype=dtype), leaves)
        for dtype in (torch.bfloat16, torch.float32)
    )
    # the kernel for narrow hidden states multiplies in fp32 anyway
    is_thin_kernel = n_embed <= THIN and loss_module.compiled_kernel(SOURCE) is not None
    assert (loss == exact_loss) == is_thin_kernel and loss == pytest.approx(exact_loss.item(), rel=0.01)
    for gradient, of_fp32 in zip(gradients, exact, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - of_fp32).norm() < 0.02 * of_fp32.norm()


def test_huge_logits_stay_finite(n_embed):
    leaves, labels = inputs(scale=100.0, n_embed=n_embed)
    assert (leaves[0] @ leaves[1].T).abs().max() > 1e4
    loss, gradients = loss_and_gradients(lambda *x: masked_loss(*x, labels, 17), leaves)
    assert all(torch.isfinite(tensor).all() for tensor in (loss, *gradients))
    torch.testing.assert_close((loss, gradients), expected(leaves, labels, 17), rtol=1e-4, atol=1e-3 * n_embed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_nan_and_infinity_are_not_hidden(n_embed, value, dtype):
    leaves, labels = inputs(n_embed=n_embed)
    with torch.no_grad():
        leaves[0][1, 0] = value  # a row with a label
    loss, (_, weight_grad, bias_grad) = loss_and_gradients(lambda *x: masked_loss(*x, labels, 17, dtype), leaves)
    assert loss.isnan() and weight_grad.isnan().any() and bias_grad.isnan().any()


def test_any_memory_layout_is_accepted_and_labels_beyond_the_vocabulary_are_refused(n_embed):
    leaves, labels = inputs(n_embed=n_embed)
    result = loss_and_gradients(lambda *x: masked_loss(*x, labels, 17), leaves)
    (hidden, weight, bias), apart = leaves, torch.stack([labels, labels], dim=1)[:, 0]
    elsewhere = [
        torch.stack([hidden, hidden], dim=1)[:, 0],
        weight.T.contiguous().T,
        torch.stack([bias, bias], dim=1)[:, 0],
    ]
    elsewhere = [x.detach().as_strided(x.shape, x.stride()).requires_grad_() for x in elsewhere]
    assert not elsewhere[0].is_contiguous() and not apart.is_contiguous()
    torch.testing.assert_close(loss_and_gradients(lambda *x: masked_loss(*x, apart, 17), elsewhere), result)
    with pytest.raises((IndexError, RuntimeError)):
        masked_loss(*leaves, torch.full_like(labels, V), 17)


def test_no_rows_give_no_loss(n_embed):
    (hidden, weight, bias), labels = inputs(n_embed=n_embed)
    loss, gradients = loss_and_gradients(
        lambda *x: masked_loss(*x, labels[:0], 1), [hidden.detach()[:0].requires_grad_(), weight, bias]
    )
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)


def test_without_a_masked_token_loss_and_gradients_are_zero(n_embed):
    leaves, labels = inputs(n_embed=n_embed)
    loss, gradients = loss_and_gradients(lambda *x: masked_loss(*x, torch.full_like(labels, IGNORED), 0), leaves)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("chunk_elements", [1, 5 * V, 10**6])
def test_scores_are_the_summed_loss_and_the_number_of_correct_guesses(monkeypatch, chunk_elements):
    in_chunks_of(monkeypatch, chunk_elements)
    (hidden, weight, bias), labels = inputs()
    guesses = (hidden @ weight.T + bias).argmax(dim=1)
    labels[1:8:2] = guesses[1:8:2]  # some are correct
    used = labels != IGNORED
    loss, correct = masked_scores(hidden, weight, bias, labels)
    assert correct == int((guesses == labels)[used].sum()) >= 4
    assert loss == pytest.approx(17 * masked_loss(hidden, weight, bias, labels, 17).item(), rel=1e-5)


def test_scores_without_a_masked_token_are_zero():
    leaves, labels = inputs()
    assert masked_scores(*leaves, torch.full_like(labels, IGNORED)) == (0.0, 0)


@pytest.mark.slow
def test_it_uses_at_most_a_tenth_of_the_memory_of_all_logits():
    rows, vocab_size, n_embed = 8192, 50_000, 128
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "head.py"),
        "--growth-of",
        "chunks",
        "--rows",
        str(rows),
        "--vocab-size",
        str(vocab_size),
        "--n-embed",
        str(n_embed),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr
    gradients = 4 * (rows + vocab_size) * n_embed
    assert gradients / 1e9 < json.loads(done.stdout) <= 0.1 * 4 * rows * vocab_size / 1e9


def gradients_of_a_step(micro_batch_size):
    masked = mask_batch(as_batch(token_rows(32)), seed=0, probability=0.3, vocab_size=VOCAB_SIZE)
    model = noisy_model(dropout=0.2)
    learner = Learner(model, configure(micro_batch_size=micro_batch_size, grad_clip=None, dropout=0.2), World.alone())
    return [
        *map(torch.tensor, learner.step(masked, 0, 0.0).read()),
        *(parameter.grad for parameter in model.parameters()),
    ]


@pytest.mark.parametrize("size", [8, 16, 5, 1])
def test_micro_batches_give_the_gradient_of_the_whole_batch_with_the_same_dropout(size):
    whole = gradients_of_a_step(None)
    assert whole[1] > 0.01
    torch.testing.assert_close(gradients_of_a_step(size), whole, rtol=1e-3, atol=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize("size, n_parts", [(8, 4), (5, 7), (32, 1), (100, 1)])
@pytest.mark.parametrize("is_filled", [False, True])
def test_micro_batches_hold_every_row_once_in_order(size, n_parts, is_filled):
    masked = mask_batch(as_batch(token_rows(32)), seed=0, probability=0.3, vocab_size=VOCAB_SIZE)
    parts = list(micro_batches(masked, size, is_filled))
    assert len(parts) == n_parts and (not is_filled or {len(part.labels) for part, _ in parts} == {size})
    for name in ("input_ids", "positions", "labels"):
        joined = np.concatenate([getattr(part, name) for part, _ in parts])
        assert (joined[:32] == getattr(masked, name)).all()
    assert (joined[32:] == IGNORED).all() and len(joined) == (n_parts * size if is_filled else 32)
    assert np.concatenate([rows for _, rows in parts])[:32].tolist() == list(range(32))
