"""Layer norm by PyTorch, and by a C kernel (norm.c) on CPUs for rows too narrow for PyTorch's.

Shapes: D numbers per row.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from microbert.kernels.compile import KERNELS, address, compiled_kernel, n_threads
from microbert.runtime.device import is_for_kernels

SOURCE = KERNELS / "norm.c"
NARROW_ROW = 8  # numbers; PyTorch takes five times as long at 8, and about the same time at 16


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each row. x: [..., D]. weight, bias: [D]. Returns [..., D]."""
    if x.shape[-1] <= NARROW_ROW and is_for_kernels(x, weight, bias):
        kernel = compiled_kernel(SOURCE, D=x.shape[-1])
        if kernel is not None:
            return _NarrowNorm.apply(x, weight, bias, eps, kernel)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class _NarrowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, kernel: ctypes.CDLL) -> Tensor:
        x = x.contiguous()
        output = torch.empty_like(x)
        kernel.forward(*_sizes(x, eps), *map(address, (x, weight, bias, output)))
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.kernel = eps, kernel
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        x_grad, parameter_grads = torch.empty_like(x), x.new_empty(2, x.shape[-1])
        output_grad = output_grad.contiguous()
        ctx.kernel.backward(*_sizes(x, ctx.eps), *map(address, (x, weight, output_grad, x_grad, parameter_grads)))
        return x_grad, *parameter_grads, None, None


def _sizes(x: Tensor, eps: float) -> tuple[ctypes.c_int, ctypes.c_long, ctypes.c_float]:
    """Return the first arguments of both functions of norm.c."""
    return n_threads(), ctypes.c_long(x.numel() // x.shape[-1]), ctypes.c_float(eps)
