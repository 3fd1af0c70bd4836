"""Attention: PyTorch's, and on CPUs a kernel of our own (attention.c) for heads that are too narrow for PyTorch's.

Heads of 2 numbers, as in v1 to v3, keep matrix products busy for a tenth of their time. The kernel is compiled at its first use, in less than a
second and anew in each process: it fits the processor that it runs on, and nothing of it stays on the disk.
Shapes: B sequences, H heads, M queries, T keys, d = head size.
"""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .device import find_compiler, is_for_narrow_heads

SOURCE = Path(__file__).with_suffix(".c")
# the last two let square roots and rounding be instructions; what else -ffast-math stands for would lose NaN, or denormals in all of the process
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")


def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value of each head.

    query: [B, H, M, d]. key, value: [B, H, T, d]. attention_mask: bool [B, 1, 1, T], True for the keys that count, of which each sequence has at
    least one; None where all do. Returns [B, H, M, d]. Fastest when they are views of [B, M or T, H, d]: so is what is returned, where the kernel
    computes it, and so are the gradients.
    """
    if is_for_narrow_heads(query, key):
        kernel = compiled_kernel(query.shape[-1])
        if kernel is not None:
            return _NarrowAttention.apply(query, key, value, attention_mask, kernel)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)


@functools.cache
def compiled_kernel(head_size: int) -> ctypes.CDLL | None:
    """attention.c for that head size; None where it cannot be compiled or loaded."""
    compiler = find_compiler()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "attention.so"
        try:
            subprocess.run([compiler, *FLAGS, f"-DHEAD={head_size}", "-o", library, SOURCE, "-lm"], check=True, capture_output=True)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError):  # no OpenMP, say, or a folder from which nothing may be run
            return None


class _Strided(ctypes.Structure):
    """A tensor [B, H, M or T, d], as attention.c takes it."""

    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_long), ("head", ctypes.c_long), ("row", ctypes.c_long)]


def _strided(x: Tensor) -> _Strided:
    return _Strided(x.data_ptr(), *x.stride()[:3])


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _sizes(query: Tensor, key: Tensor) -> tuple:
    return ctypes.c_int(torch.get_num_threads()), *map(ctypes.c_long, (*query.shape[:3], key.shape[2]))


def _new_like(x: Tensor) -> Tensor:
    """x: [B, H, M, d]. An empty tensor of its shape, in memory [B, M, H, d]."""
    B, H, M, d = x.shape
    return x.new_empty(B, M, H, d).transpose(1, 2)


def _with_whole_rows(x: Tensor) -> Tensor:
    """The same numbers, with those of a row beside each other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _NarrowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, kernel: ctypes.CDLL) -> Tensor:
        query, key, value = map(_with_whole_rows, (query, key, value))
        is_real = None if attention_mask is None else attention_mask.contiguous()
        output, log_sum = _new_like(query), query.new_empty(query.shape[:3])
        kernel.forward(*_sizes(query, key), *map(_strided, (query, key, value)), _address(is_real), _strided(output), _address(log_sum))
        ctx.save_for_backward(query, key, value, is_real, output, log_sum)
        ctx.kernel = kernel
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, is_real, output, log_sum = ctx.saved_tensors
        gradients = tuple(map(_new_like, (query, key, value)))
        output_grad = _with_whole_rows(output_grad)
        ctx.kernel.backward(*_sizes(query, key), *map(_strided, (query, key, value)), _address(is_real), _strided(output), _address(log_sum),
                            *map(_strided, (output_grad, *gradients)))
        return *gradients, None, None
