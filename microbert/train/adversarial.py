"""Adversarial training: change the embeddings of a batch a little, in the direction that raises the loss most.

The loss of the changed batch is added to the ordinary one, so a step takes twice the time. It keeps a classifier from
learning its texts by heart (Miyato et al. 2017, arXiv:1605.07725).
Shapes: B texts, T tokens, D = n_embed.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from microbert.data.tokenizer import PAD_ID
from microbert.model.layers import Embeddings

SMALLEST_NORM = 1e-12  # of a gradient: a text without one stays as it is


class EmbeddingChange:
    """Records the embeddings of each training pass, and changes those of the passes inside `against`."""

    def __init__(self, embeddings: Embeddings, size: float) -> None:
        """size: norm of the change of a text's embeddings, as a share of their own norm; [PAD] counts in neither."""
        self._size = size
        self._is_real: Tensor | None = None  # bool [B, T]: not [PAD]
        self._recorded: Tensor | None = None  # [B, T, D]
        self._change: Tensor | None = None  # [B, T, D]
        self._hook = embeddings.register_forward_hook(self._pass)

    def remove(self) -> None:
        """Leave the embeddings as they were before."""
        self._hook.remove()

    def _pass(self, module: nn.Module, arguments: tuple, x: Tensor) -> Tensor:
        """Return the output of the embeddings x: [B, T, D], as it is to be used."""
        if self._change is not None:
            return x + self._change
        if not torch.is_grad_enabled():
            return x
        self._is_real = arguments[0] != PAD_ID
        self._recorded = x if x.requires_grad else x.requires_grad_()  # also where the embeddings are frozen
        self._recorded.retain_grad()
        return x

    @contextlib.contextmanager
    def against(self) -> Iterator[None]:
        """Change the embeddings along the gradient of the last loss, whose backward pass is done."""
        assert self._is_real is not None and self._recorded is not None and self._recorded.grad is not None
        # without [PAD]: the change of a text must not depend on how long the others of its batch are
        x, gradient = (each * self._is_real[:, :, None] for each in (self._recorded.detach(), self._recorded.grad))
        norms = [each.flatten(1).norm(dim=1).clamp_min(SMALLEST_NORM)[:, None, None] for each in (x, gradient)]
        self._change, self._recorded = self._size * norms[0] * gradient / norms[1], None
        try:
            yield
        finally:
            self._change = None
