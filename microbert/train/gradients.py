"""The gradients of a model: accumulated over micro-batches, summed over processes, clipped.

W: number of processes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from microbert.runtime.distributed import World

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the parameter's gradient. Raises RuntimeError before the first backward pass."""
    if parameter.grad is None:
        raise RuntimeError("a parameter has no gradient: it is not part of the loss")
    return parameter.grad


class Gradients:
    """The gradients of a model's parameters.

    is_captured: a CUDA graph computes them, so they stay at one place in memory.
    """

    def __init__(self, model: nn.Module, world: World, is_captured: bool) -> None:
        self._parameters, self._world, self._is_captured = list(model.parameters()), world, is_captured
        if is_captured:
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)

    def tensors(self) -> list[Tensor]:
        """Return them in the order of the parameters."""
        return [gradient_of(parameter) for parameter in self._parameters]

    def reset(self) -> None:
        """Set them to zero, or free their memory."""
        if self._is_captured:
            torch._foreach_zero_(self.tensors())
        else:
            for parameter in self._parameters:
                parameter.grad = None

    def pack(self, loss: Tensor) -> Tensor:
        """Return a vector of the gradients and W losses, in which the other processes' losses are 0.

        loss: []. A single process gets only its loss, [1]: there is nothing to send.
        """
        losses = loss.new_zeros(self._world.size)
        losses[self._world.rank] = loss
        if self._world.size == 1:
            return losses
        return torch.cat([*(gradient.reshape(-1) for gradient in self.tensors()), losses])

    def all_reduce(self, packed: Tensor) -> Tensor:
        """Sum what the processes have packed, set the gradients to it and return the losses, [W]."""
        self._world.all_reduce(packed)
        sizes = [parameter.numel() for parameter in self._parameters]
        if self._world.size > 1:
            *parts, _ = packed.split([*sizes, self._world.size])
            shaped = [part.view_as(parameter) for parameter, part in zip(self._parameters, parts, strict=True)]
            if self._is_captured:
                torch._foreach_copy_(self.tensors(), shaped)
            else:
                for parameter, gradient in zip(self._parameters, shaped, strict=True):
                    parameter.grad = gradient
        return packed[-self._world.size :]

    def clip(
        self, losses: Tensor, scale: Tensor | float, max_norm: float | None, is_broken: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scale the losses and gradients, and clip the gradients to a norm of `max_norm`.

        losses: [W]. is_broken: [], set to 1.0 if a loss or the norm is not finite. Returns the scaled losses and the
        norm before clipping. Changes the gradients last, so that a repetition after running out of memory does not
        scale them twice.
        """
        gradients = self.tensors()
        grad_norm = scale * get_total_norm(gradients)
        losses = scale * losses
        factor = scale * torch.clamp((max_norm or math.inf) / (grad_norm + CLIP_EPS), max=1.0)
        is_finite = torch.isfinite(losses.sum()) & torch.isfinite(grad_norm)
        is_broken.copy_(torch.maximum(is_broken, (~is_finite).to(is_broken.dtype)))
        torch._foreach_mul_(gradients, factor)
        return losses, grad_norm
