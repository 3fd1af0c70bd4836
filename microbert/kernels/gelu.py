"""GELU by PyTorch, and by a C kernel (gelu.c) on CPUs in fp32."""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from microbert.kernels.compile import KERNELS, address, compiled_kernel, n_threads
from microbert.runtime.device import is_for_kernels

SOURCE = KERNELS / "gelu.c"


def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU of each number, not the approximation by tanh.

    x: [..., D]. A slice of a wider tensor's last dimension is not copied.
    """
    kernel = compiled_kernel(SOURCE) if is_for_kernels(x) else None
    return F.gelu(x) if kernel is None else _Gelu.apply(x, kernel)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: ctypes.CDLL) -> Tensor:
        if _row_stride(x) is None:
            x = x.contiguous()
        output = x.new_empty(x.shape)
        kernel.forward(*_sizes(x), address(x), address(output))
        ctx.save_for_backward(x)
        ctx.kernel = kernel
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        x_grad, output_grad = x.new_empty(x.shape), output_grad.contiguous()
        ctx.kernel.backward(*_sizes(x), address(x), address(output_grad), address(x_grad))
        return x_grad, None


def _row_stride(x: Tensor) -> int | None:
    """Return the stride between rows; None if it varies, or if the numbers of a row are not contiguous."""
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:
        return None
    return rows.stride(0) if rows.stride(1) == 1 else None


def _sizes(x: Tensor) -> tuple[ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_long]:
    """Return the first arguments of both functions of gelu.c. x has a row stride."""
    D = x.shape[-1]
    return n_threads(), ctypes.c_long(x.numel() // D), ctypes.c_long(D), ctypes.c_long(_row_stride(x) or 0)
