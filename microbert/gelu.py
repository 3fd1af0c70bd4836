"""GELU: PyTorch's, and on CPUs in fp32 a kernel of our own (gelu.c)."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .device import is_for_kernels
from .kernels import address, compiled_kernel, n_threads

SOURCE = Path(__file__).with_suffix(".c")


def gelu(x: Tensor) -> Tensor:
    """Of each number; not the approximation by tanh."""
    kernel = compiled_kernel(SOURCE) if is_for_kernels(x) else None
    return F.gelu(x) if kernel is None else _Gelu.apply(x, kernel)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: ctypes.CDLL) -> Tensor:
        x = x.contiguous()
        output = torch.empty_like(x)
        kernel.forward(n_threads(), ctypes.c_long(x.numel()), address(x), address(output))
        ctx.save_for_backward(x)
        ctx.kernel = kernel
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        x_grad, output_grad = torch.empty_like(x), output_grad.contiguous()
        ctx.kernel.backward(n_threads(), ctypes.c_long(x.numel()), address(x), address(output_grad), address(x_grad))
        return x_grad, None
