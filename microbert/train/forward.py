"""The forward pass on a device: inputs sent there, matrices multiplied in the chosen dtype, the model compiled.

Shapes: B sequences, T = max_seq_len, M masked slots per sequence, D = n_embed, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microbert.config.constants import Config
from microbert.data.masking import MaskedBatch
from microbert.data.tokenizer import PAD_ID
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.device import autocast, compute_dtype, is_compiled, send
from microbert.runtime.torch_compile import compiled


class Inputs(NamedTuple):
    """A masked batch on the device.

    input_ids: [B, T]. attention_mask: [B, T], or None without padding. positions, labels: [B, M]. dropout_keys: [B], or
    None without dropout.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    dropout_keys: Tensor | None
    labels: Tensor


class Forward:
    """The forward pass of a model as its device computes it.

    dtype: of matrix products. varies: whether batches have several shapes, with and without padding.
    """

    def __init__(self, model: MaskedLanguageModel, config: Config) -> None:
        self._model, self._packing, self.varies = model, config.packing, config.rows == "documents"
        self._device = model.output_bias.device
        self.dtype, self.is_compiled = compute_dtype(config, self._device), is_compiled(config, self._device)
        self.compile()

    def compile(self) -> None:
        """Compile the model for the shapes that follow, if at all, and forget those before."""
        self._compiled: Callable[..., Tensor] = self._model
        if self.is_compiled:
            torch.compiler.reset()
            # None: the first length is compiled for its shape alone, the second one for all
            self._compiled = compiled(self._model, dynamic=None if self.varies else False)

    def send(self, masked: MaskedBatch, dropout_keys: np.ndarray | None, needs_mask: bool = False) -> Inputs:
        """Send a batch to the device. needs_mask: make an attention mask even without padding."""
        is_real = masked.input_ids != PAD_ID
        return Inputs(
            send(masked.input_ids, self._device),
            send(is_real, self._device) if needs_mask or not is_real.all() else None,
            send(masked.positions, self._device),
            None if dropout_keys is None else send(dropout_keys, self._device),
            send(masked.labels, self._device),
        )

    def __call__(self, inputs: Inputs, may_compile: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the arguments of the loss functions: hidden [B * M, D], weight [V, D], bias [V] and labels [B * M].

        may_compile: use the compiled model, if there is one.
        """
        # with packing, only the last sequence of a corpus has padding: compiling for it takes longer than it saves
        is_usual = self.varies or (inputs.attention_mask is None) == self._packing
        forward = self._compiled if may_compile and is_usual else self._model
        with autocast(self.dtype, self._device):
            hidden = forward(inputs.input_ids, inputs.attention_mask, inputs.positions, inputs.dropout_keys)
        return hidden.float(), self._model.output_weight, self._model.output_bias, inputs.labels.reshape(-1)
