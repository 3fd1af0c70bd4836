"""Attention by PyTorch, and by a C kernel (attention.c) on CPUs for heads too narrow for PyTorch's.

With heads of 2 numbers, as in v1 to v3, matrix products reach a tenth of their speed.
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
# numbers; PyTorch's attention takes three to five times as long as the kernel at 2, 1.7 times at 8, and less time at 16
# (benchmarks/attention.py)
NARROW_HEAD = 8
LONGEST_ROW = 4096  # keys; a thread of the kernel needs half a megabyte of stack for them


def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return softmax(query key^T / sqrt(d)) value for each head: [B, H, M, d].

    query: [B, H, M, d]. key, value: [B, H, T, d]. attention_mask: bool [B, 1, 1, T], True for the keys to attend to, at
    least one in each sequence; None for all keys. Fastest for views of [B, M or T, H, d], which is also the layout of
    the kernel's output and gradients.
    """
    # on a CPU, PyTorch's backward pass takes seven times as long in bf16
    if is_real_on_cpu(query) and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attend(query.float(), key.float(), value.float(), attention_mask)
    if query.shape[-1] <= NARROW_HEAD and key.shape[2] <= LONGEST_ROW and is_for_kernels(query, key, value):
        kernel = compiled_kernel(SOURCE, HEAD=query.shape[-1])
        if kernel is not None:
            return _NarrowAttention.apply(query, key, value, attention_mask, kernel)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)


class _Strided(ctypes.Structure):
    """A tensor [B, H, M or T, d] as an argument of attention.c."""

    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_long), ("head", ctypes.c_long), ("row", ctypes.c_long)]


def _strided(x: Tensor) -> _Strided:
    return _Strided(x.data_ptr(), *x.stride()[:3])


def _sizes(query: Tensor, key: Tensor) -> tuple:
    return n_threads(), *map(ctypes.c_long, (*query.shape[:3], key.shape[2]))


def _new_like(x: Tensor) -> Tensor:
    """Return an empty tensor of the shape of x: [B, H, M, d], in memory [B, M, H, d]."""
    B, H, M, d = x.shape
    return x.new_empty(B, M, H, d).transpose(1, 2)


def _with_whole_rows(x: Tensor) -> Tensor:
    """Return x with the numbers of each row contiguous in memory."""
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
        query_grad, key_grad, value_grad = map(_new_like, (query, key, value))
        output_grad = _with_whole_rows(output_grad)
        ctx.kernel.backward(
            *_sizes(query, key),
            *map(_strided, (query, key, value)),
            address(is_real),
            _strided(output),
            address(log_sum),
            *map(_strided, (output_grad, query_grad, key_grad, value_grad)),
        )
        return query_grad, key_grad, value_grad, None, None
