"""The kernel computes GELU and its slope to the precision of fp32."""

import pytest
import torch
from models import on_threads
from torch.nn import functional as F

import microbert.kernels.gelu
from microbert.kernels.compile import compiled_kernel
from microbert.kernels.gelu import SOURCE, gelu

needs_kernel = pytest.mark.skipif(compiled_kernel(SOURCE) is None, reason="no C compiler with OpenMP")


def output_and_gradient(function, x):
    x = x.requires_grad_()
    output = function(x)
    return output.detach(), *torch.autograd.grad(
        output, x, torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    )


@needs_kernel
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100_003])
@pytest.mark.parametrize("extent", [0.01, 1.0, 14.0])
def test_values_and_slopes_are_those_of_pytorch_in_doubles(n, extent):
    x = torch.linspace(-extent, extent, n)
    exact_results = output_and_gradient(F.gelu, x.detach().double())
    for ours, exact in zip(output_and_gradient(gelu, x), exact_results, strict=True):
        assert (ours - exact).abs().max() < 1e-6
    assert "_Gelu" in gelu(x).grad_fn.name()


@needs_kernel
def test_far_from_zero_it_is_the_number_itself_or_zero():
    x = torch.tensor([-1e30, -30.0, 0.0, 30.0, 1e30])
    output, gradient = output_and_gradient(gelu, x)
    assert torch.allclose(output, torch.tensor([0.0, 0.0, 0.0, 30.0, 1e30])) and torch.allclose(
        gradient, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0])
    )
    assert output_and_gradient(gelu, torch.tensor([float("nan")]))[0].isnan()


@needs_kernel
@pytest.mark.parametrize("n_threads", [1, 3])
def test_any_memory_layout_is_accepted_and_a_slice_is_not_copied(n_threads):
    x = torch.randn(6, 5, 50, generator=torch.Generator().manual_seed(0))
    for view in (x, x.transpose(0, 2), x[..., 20:41], x[:, 1], x[0, :, :7]):
        for ours, exact in zip(
            on_threads(n_threads, output_and_gradient, gelu, view.detach()),
            output_and_gradient(F.gelu, view.detach().double()),
            strict=True,
        ):
            assert (ours - exact).abs().max() < 1e-6
    part = x[..., 20:41].requires_grad_()
    assert gelu(part).grad_fn.saved_tensors[0].data_ptr() == part.data_ptr()


def test_pytorch_computes_other_dtypes_and_without_a_compiler(monkeypatch):
    x = torch.linspace(-3, 3, 100)
    assert torch.equal(gelu(x.bfloat16()), F.gelu(x.bfloat16()))
    monkeypatch.setattr(microbert.kernels.gelu, "compiled_kernel", lambda _: None)
    assert torch.equal(gelu(x), F.gelu(x))
