"""Attention: PyTorch's, and on CPUs a kernel of our own (attention.c) for heads that are too narrow for PyTorch's.

Heads of 2 numbers, as in v1 to v3, keep matrix products busy for a tenth of their time.
Shapes: B sequences, H heads, M queries, T keys, d = head size.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from microbert.kernels.compile import KERNELS, address, compiled_kernel, n_threads
from microbert.runtime.device import is_for_kernels, is_real_on_cpu

SOURCE = KERNELS / "attention.c"
NARROW_HEAD = 8  # numbers; with 8 PyTorch's attention takes 1.7 times as long as ours, with 2 three to five times, with 16 less time (benchmarks/attention.py)
LONGEST_ROW = 4096  # keys, of which a thread of our attention holds half a megabyte on its stack


def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value of each head.

    query: [B, H, M, d]. key, value: [B, H, T, d]. attention_mask: bool [B, 1, 1, T], True for the keys that count, of which each sequence has at
    least one; None where all do. Returns [B, H, M, d]. Fastest when they are views of [B, M or T, H, d]: so is what is returned, where the kernel
    computes it, and so are the gradients.
    """
    if is_real_on_cpu(query) and torch.is_autocast_enabled(
        "cpu"
    ):  # there PyTorch's way back takes seven times as long in bf16
        with torch.autocast("cpu", enabled=False):
            return attend(query.float(), key.float(), value.float(), attention_mask)
    if query.shape[-1] <= NARROW_HEAD and key.shape[2] <= LONGEST_ROW and is_for_kernels(query, key, value):
        kernel = compiled_kernel(SOURCE, HEAD=query.shape[-1])
        if kernel is not None:
            return _NarrowAttention.apply(query, key, value, attention_mask, kernel)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)


class _Strided(ctypes.Structure):
    """A tensor [B, H, M or T, d], as attention.c takes it."""

    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_long), ("head", ctypes.c_long), ("row", ctypes.c_long)]


def _strided(x: Tensor) -> _Strided:
    return _Strided(x.data_ptr(), *x.stride()[:3])


def _sizes(query: Tensor, key: Tensor) -> tuple:
    return n_threads(), *map(ctypes.c_long, (*query.shape[:3], key.shape[2]))


def _new_like(x: Tensor) -> Tensor:
    """x: [B, H, M, d]. An empty tensor of its shape, in memory [B, M, H, d]."""
    B, H, M, d = x.shape
    return x.new_empty(B, M, H, d).transpose(1, 2)


def _with_whole_rows(x: Tensor) -> Tensor:
    """The same numbers, with those of a row beside each other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _NarrowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, kernel: ctypes.CDLL
    ) -> Tensor:
        query, key, value = map(_with_whole_rows, (query, key, value))
        is_real = None if attention_mask is None else attention_mask.contiguous()
        output, log_sum = _new_like(query), query.new_empty(query.shape[:3])
        kernel.forward(
            *_sizes(query, key),
            *map(_strided, (query, key, value)),
            address(is_real),
            _strided(output),
            address(log_sum),
        )
        ctx.save_for_backward(query, key, value, is_real, output, log_sum)
        ctx.kernel = kernel
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, is_real, output, log_sum = ctx.saved_tensors
        gradients = tuple(map(_new_like, (query, key, value)))
        output_grad = _with_whole_rows(output_grad)
        ctx.kernel.backward(
            *_sizes(query, key),
            *map(_strided, (query, key, value)),
            address(is_real),
            _strided(output),
            address(log_sum),
            *map(_strided, (output_grad, *gradients)),
        )
        return *gradients, None, None
