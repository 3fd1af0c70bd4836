"""The kernel for narrow rows computes the same as PyTorch's layer norm."""

import ctypes
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import many_examples, on_threads
from torch.nn import functional as F

import microbert.kernels.norm
from microbert.kernels.compile import address, compiled_kernel
from microbert.kernels.norm import NARROW_ROW, SOURCE, layer_norm

needs_kernel = pytest.mark.skipif(compiled_kernel(SOURCE, D=4) is None, reason="no C compiler with OpenMP")
EPS = 1e-12


def inputs(D=4, rows=(3, 5), seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, output_grad = (
        torch.randn(shape, generator=generator) for shape in ((*rows, D), (D,), (D,), (*rows, D))
    )
    x = scale * (x + 2 * torch.arange(D)) + 1  # rows of nearly equal numbers are inexact in both
    return [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()], output_grad


def output_and_gradients(function, tensors, output_grad):
    output = function(*tensors)
    return output.detach(), *torch.autograd.grad(output, tensors, output_grad)


def ours(x, weight, bias):
    return layer_norm(x, weight, bias, EPS)


def pytorch_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def is_ours(output):
    return "NarrowNorm" in output.grad_fn.name()


@needs_kernel
@many_examples
@given(
    st.integers(3, NARROW_ROW),
    st.integers(1, 70),
    st.integers(0, 100),
    st.sampled_from([0.1, 1.0, 10.0]),
    st.integers(1, 4),
)
def test_output_and_gradients_are_those_of_pytorch(D, n_rows, seed, scale, n_threads):
    tensors, output_grad = inputs(D, (n_rows,), seed, scale)
    assert is_ours(ours(*tensors))
    in_doubles = output_and_gradients(
        pytorch_norm, [x.detach().double().requires_grad_() for x in tensors], output_grad.double()
    )
    found = on_threads(n_threads, output_and_gradients, ours, tensors, output_grad)
    for mine, exact in zip(found, in_doubles, strict=True):
        assert mine.shape == exact.shape and (mine - exact).abs().max() <= 1e-5 / min(1, scale) * (
            1 + exact.abs().max()
        )


@needs_kernel
def test_any_memory_layout_gives_bitwise_the_same_results():
    tensors, output_grad = inputs(rows=(30, 50))
    expected = on_threads(3, output_and_gradients, ours, tensors, output_grad)
    apart = [tensors[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), *tensors[1:]]
    grad_apart = output_grad.transpose(0, 1).contiguous().transpose(0, 1)
    found = on_threads(3, output_and_gradients, ours, apart, grad_apart)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pytorch_computes_wide_rows_other_dtypes_and_without_a_compiler(monkeypatch):
    assert not is_ours(ours(*inputs(NARROW_ROW + 1)[0])) and not is_ours(ours(*(x.double() for x in inputs()[0])))
    monkeypatch.setattr(microbert.kernels.norm, "compiled_kernel", lambda *_, **__: None)
    tensors, _ = inputs()
    assert torch.equal(ours(*tensors), pytorch_norm(*tensors)) and not is_ours(ours(*tensors))


@needs_kernel
@pytest.mark.parametrize("n_embed", [4, NARROW_ROW])
@pytest.mark.parametrize("n_rows", [10, 32])
def test_gradients_do_not_depend_on_where_arrays_lie_in_memory(n_embed, n_rows):
    """A compiler may choose other loops for adjacent arrays. Some of these once fused a product with its sum."""
    kernel, generator, rng = compiled_kernel(SOURCE, D=n_embed), torch.Generator().manual_seed(0), random.Random(0)
    x, output_grad = torch.randn(2, n_rows * n_embed, generator=generator)
    arrays = [
        x,
        output_grad,
        torch.randn(n_embed, generator=generator),
        torch.zeros_like(x),
        torch.zeros(2 * n_embed),
    ]  # the last two are x_grad and parameter_grads

    def gradients():
        buffer, placed, end = torch.zeros(10_000), {}, 0
        for number in rng.sample(range(5), 5):
            start = end + rng.choice([0, 8, 16, 500])
            end = start + len(arrays[number])
            placed[number] = buffer[start:end].copy_(arrays[number])
        of_x, of_output, of_weight, x_grad, parameter_grads = (address(placed[number]) for number in range(5))
        kernel.backward(
            ctypes.c_int(1),
            ctypes.c_long(n_rows),
            ctypes.c_float(EPS),
            of_x,
            of_weight,
            of_output,
            x_grad,
            parameter_grads,
        )
        return placed[3].tolist(), placed[4].tolist()

    expected = gradients()
    assert all(gradients() == expected for _ in range(300))
