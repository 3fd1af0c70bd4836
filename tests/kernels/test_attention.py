"""The kernel for narrow heads computes the same as PyTorch's attention, which computes all other cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import many_examples, on_threads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import microbert.kernels.attention
from microbert.kernels.attention import LONGEST_ROW, NARROW_HEAD, SOURCE, attend
from microbert.kernels.compile import compiled_kernel

needs_kernel = pytest.mark.skipif(compiled_kernel(SOURCE, HEAD=2) is None, reason="no C compiler with OpenMP")


def inputs(B=2, H=3, M=5, T=7, d=2, seed=0, scale=2.0, is_masked=False, dtype=torch.float32):
    """Return query, key and value as views of one projection, a mask, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return scale * torch.randn(shape, generator=generator, dtype=dtype)

    query = numbers(B, M, H, d).transpose(1, 2).requires_grad_()
    key, value = (x.detach().requires_grad_() for x in numbers(B, T, 2, H, d).permute(2, 0, 3, 1, 4))
    mask = torch.rand(B, 1, 1, T, generator=generator) < 0.6
    mask[..., T // 2] = True
    return (query, key, value), mask if is_masked else None, numbers(B, H, M, d)


def output_and_gradients(function, tensors, mask, output_grad):
    output = function(*tensors, mask)
    return output.detach(), *torch.autograd.grad(output, tensors, output_grad)


def pytorch_attention(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def is_ours(output):
    return "NarrowAttention" in output.grad_fn.name()


@needs_kernel
@many_examples
@given(
    B=st.integers(1, 4),
    H=st.integers(1, 4),
    M=st.integers(1, 20),
    T=st.integers(1, 40),
    d=st.integers(1, NARROW_HEAD),
    seed=st.integers(0, 100),
    scale=st.sampled_from([0.01, 1.0, 3.0]),
    is_masked=st.booleans(),
)
def test_output_and_gradients_are_those_of_pytorch(d, scale, is_masked, **sizes):
    tensors, mask, output_grad = inputs(d=d, scale=scale, is_masked=is_masked, **sizes)
    assert is_ours(attend(*tensors, mask))
    in_doubles = output_and_gradients(
        pytorch_attention, [x.detach().double().requires_grad_() for x in tensors], mask, output_grad.double()
    )
    tolerance = 1e-5 * scale * max(1, d * scale**2)  # the terms of a gradient are products of three numbers
    for ours, exact in zip(output_and_gradients(attend, tensors, mask, output_grad), in_doubles, strict=True):
        assert (ours - exact).abs().max() <= tolerance


@needs_kernel
@pytest.mark.parametrize("layout", ["contiguous", "numbers apart"])
def test_any_memory_layout_is_accepted(layout):
    tensors, mask, output_grad = inputs(is_masked=True)
    expected = output_and_gradients(attend, tensors, mask, output_grad)
    change = (
        torch.Tensor.contiguous
        if layout == "contiguous"
        else lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)
    )
    *tensors, output_grad = map(change, (*tensors, output_grad))
    tensors = [x.detach().requires_grad_() for x in tensors]
    found = output_and_gradients(attend, tensors, mask.expand(2, 1, 1, 7), output_grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_kernel
def test_results_are_bitwise_the_same_each_time_and_on_any_number_of_threads():
    tensors, mask, output_grad = inputs(B=8, H=4, M=64, T=64, is_masked=True)
    results = [on_threads(n, output_and_gradients, attend, tensors, mask, output_grad) for n in (1, 2, 2, 3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@needs_kernel
@pytest.mark.parametrize("T", [7, 16, 33])
def test_queries_far_from_all_keys_have_finite_gradients(T):
    """The padding after the keys in a vector then overflows fp32, and must not reach the results."""
    for score in torch.linspace(-400, -50, 500):  # nats, of each key
        query, key = torch.zeros(1, 1, 3, 2), torch.ones(1, 1, T, 2)
        query[..., 0] = score * 2**0.5
        value = torch.linspace(-1, 1, 2 * T).view(1, 1, T, 2)
        tensors = [x.requires_grad_() for x in (query, key, value)]
        in_doubles = output_and_gradients(
            pytorch_attention,
            [x.detach().double().requires_grad_() for x in tensors],
            None,
            torch.ones(1, 1, 3, 2).double(),
        )
        found = output_and_gradients(attend, tensors, None, torch.ones(1, 1, 3, 2))
        for ours, exact in zip(found, in_doubles, strict=True):
            assert (ours - exact).abs().max() <= 1e-4 * (1 + score.abs())


@needs_kernel
def test_the_longest_rows_are_computed_correctly():
    tensors, mask, output_grad = inputs(B=1, H=2, M=3, T=LONGEST_ROW, d=NARROW_HEAD, scale=0.5)
    assert is_ours(attend(*tensors, mask))
    for ours, theirs in zip(
        on_threads(2, output_and_gradients, attend, tensors, mask, output_grad),
        output_and_gradients(pytorch_attention, tensors, mask, output_grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@needs_kernel
def test_large_scores_stay_finite_and_nan_stays_nan():
    tensors, mask, output_grad = inputs(scale=1e4)
    assert all(torch.isfinite(x).all() for x in output_and_gradients(attend, tensors, mask, output_grad))
    for number in range(3):
        with torch.no_grad():
            spoilt = [x.clone() for x in tensors]
            spoilt[number][1, 1, 3, 0] = float("nan")
        output, *gradients = output_and_gradients(attend, [x.requires_grad_() for x in spoilt], mask, output_grad)
        assert (
            output[1, 1].isnan().any()
            and all(x[1, 1].isnan().any() for x in gradients[:2])
            and output[0].isfinite().all()
        )


def test_pytorch_computes_wide_heads_long_rows_and_tensors_without_data(monkeypatch):
    assert is_ours(attend(*inputs(d=NARROW_HEAD)[0], None)) or compiled_kernel(SOURCE, HEAD=2) is None
    assert not is_ours(attend(*inputs(d=NARROW_HEAD + 1)[0], None)) and not is_ours(
        attend(*inputs(dtype=torch.float64)[0], None)
    )
    (query, key, value), *_ = inputs()
    assert not is_ours(attend(*(x.to("meta") for x in (query, key, value)), None))
    with FakeTensorMode():
        assert attend(*(torch.empty(2, 3, 7, 2) for _ in range(3)), None).shape == (2, 3, 7, 2)
    assert torch.equal(
        torch.compile(attend, backend="eager", fullgraph=True)(query, key, value, None),
        pytorch_attention(query, key, value, None),
    )
    monkeypatch.setattr(microbert.kernels.attention, "LONGEST_ROW", 6)
    assert not is_ours(attend(query, key, value, None))


@pytest.mark.parametrize("d", [2, 16])
def test_under_autocast_a_cpu_attends_in_fp32(d):
    tensors, mask, output_grad = inputs(d=d, is_masked=True)
    expected = output_and_gradients(attend, tensors, mask, output_grad)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(*tensors, mask)
    found = (output, *torch.autograd.grad(output, tensors, output_grad))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pytorch_computes_without_the_kernel(monkeypatch):
    monkeypatch.setattr(microbert.kernels.attention, "compiled_kernel", lambda *_, **__: None)
    tensors, mask, _ = inputs(is_masked=True)
    assert not is_ours(attend(*tensors, mask))
    assert torch.equal(attend(*tensors, mask), pytorch_attention(*tensors, mask))
