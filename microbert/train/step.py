"""One update from one batch.

A step that runs out of memory is repeated with smaller micro-batches, in all processes. No process sends gradients
while another can still run out of memory: each one accumulates its micro-batches, then all report how that went, then
they reduce. A process that runs out of memory in the update has changed no weight yet: it reports that at the next
gathering and repeats the update. No process waits for its device: you read a step's numbers while the next one runs.

Shapes: B sequences of a process's batch, T = max_seq_len, M masked slots per sequence, W processes.
"""

import functools
import math
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor

from microbert.config.constants import ResolvedConfig
from microbert.data.masking import IGNORED, MaskedBatch
from microbert.data.row_lengths import row_lengths, rows_at_a_time
from microbert.errors import Diverged
from microbert.model.layers import MaskedLanguageModel
from microbert.model.loss import masked_loss
from microbert.runtime.counter_rng import random_bits
from microbert.runtime.cuda_graph import Captured
from microbert.runtime.device import HostCopy, free_memory, is_captured, send
from microbert.runtime.distributed import World
from microbert.train.forward import Forward, Inputs
from microbert.train.gradients import Gradients
from microbert.train.optim import Optimizer
from microbert.train.shortage import BatchSizes


class Step:
    """A completed step.

    number: counted from 0. stopping: the ranks that received a signal. time_used: reported by the first process.
    """

    def __init__(self, number: int, losses: Tensor, grad_norm: Tensor, stopping: list[int], time_used: float) -> None:
        """losses: [W], each process's share of the mean loss, in nats. grad_norm: [], before clipping."""
        self.number, self.stopping, self.time_used = number, stopping, time_used
        self._numbers = HostCopy(torch.cat([losses, grad_norm[None]]))

    def read(self) -> tuple[float, float]:
        """Return the mean loss in nats per masked token, and the norm of the gradient before clipping.

        Raises Diverged, in all processes, if one of them is not finite. Then neither this step nor a later one was
        applied.
        """
        *losses, grad_norm = self._numbers.read().tolist()
        loss = sum(losses)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            rank = None if math.isfinite(loss) else int(np.argmin(np.isfinite(losses)))
            where = f" (in process {rank} of {len(losses)})" if len(losses) > 1 and rank is not None else ""
            raise Diverged(
                f"step {self.number}: the loss is {loss:g}{where} and the gradient norm {grad_norm:g}, so this step "
                "was not applied. The last checkpoint is from before it. Lower learning_rate or grad_clip",
                rank,
            )
        return loss, grad_norm


class Learner:
    """A model and its optimizer, which learn on the model's device as one of the processes of `world`.

    sizes: the sequences computed at a time. CUDA graphs are given up once memory runs out: a graph keeps its memory,
    and evaluation needs some in addition.
    """

    def __init__(self, model: MaskedLanguageModel, config: ResolvedConfig, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        self.device = model.output_bias.device
        self._is_captured = is_captured(config, self.device)
        self.forward = Forward(model, config)
        self.gradients = Gradients(model, world, self._is_captured)
        self.optimizer = Optimizer(model, config, self._is_captured)
        self.sizes = BatchSizes(config, model.config.vocab_size, self.device, world, self._stop_capturing)
        n_shapes = 2 * len(row_lengths(config)) if self.forward.varies else 1  # with and without an attention mask
        self._backward = Captured(self._backward_of, self.device, self._is_captured, n_shapes)
        self._update = Captured(self._update_by, self.device, self._is_captured)
        self._is_broken = torch.zeros((), device=self.device)  # 1.0 from the first step with a non-finite number on
        self._clipped: tuple[Tensor, Tensor] | None = None  # losses and norm, between clipping and optimizer step
        world.on_shortage = functools.partial(self._ran_short, "in the update ")

    def hidden(self, masked: MaskedBatch, dropout_keys: np.ndarray | None = None) -> tuple[Tensor, ...]:
        """Return the arguments of the loss functions, computed without torch.compile. dropout_keys: int64 [B]."""
        return self.forward(self.forward.send(masked, dropout_keys), may_compile=False)

    def is_finite(self) -> bool:
        """Return whether all weights are finite, in every process. Waits for the device."""
        return bool(torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all())

    def step(
        self,
        masked: MaskedBatch,
        number: int,
        learning_rate: float,
        is_to_stop: bool = False,
        time_used: float = 0.0,
    ) -> Step:
        """Update the weights from one batch.

        masked: this process's share of the batch. is_to_stop, time_used: to share with the other processes. Raises
        Failed in all processes if one of them has no memory for a single sequence.
        """
        self.model.train()
        self.sizes.step = number
        if self.sizes.ran_short or self._backward.is_on != self._update.is_on:  # capture both or none
            self._stop_capturing()
        while True:
            packed = self._accumulate(masked, number)  # forward, loss and backward of each micro-batch
            table, late = self.world.try_gather(masked.n_masked, is_to_stop, packed is None, time_used)
            n_masked, stopping, short, times = table.T  # [W] each
            if late:
                self.world.on_shortage(late)
            elif short.any():
                self._ran_short("", np.flatnonzero(short).tolist())
            elif packed is not None:
                break
            packed = None  # free its memory
        losses = self.gradients.all_reduce(packed)
        scale = masked.labels.size / max(1, n_masked.sum())  # from a mean over slots to one over masked tokens
        losses, grad_norm = self._clip_and_update(losses, scale, learning_rate)
        return Step(number, losses, grad_norm, np.flatnonzero(stopping).tolist(), times[0])

    def _accumulate(self, masked: MaskedBatch, number: int) -> Tensor | None:
        """Return this process's packed gradients and loss, as if every slot held a masked token.

        None: memory has run out.
        """
        self.gradients.reset()
        packed = self.sizes.within_memory(lambda: self.gradients.pack(self._backward_in_parts(masked, number)))
        if packed is None:
            self.gradients.reset()
            free_memory(self.device)
        return packed

    def _backward_in_parts(self, masked: MaskedBatch, number: int) -> Tensor:
        """Accumulate the gradients of all micro-batches, and return their loss, []."""
        n_slots, n_rows = masked.labels.size, len(masked.labels)
        keys = None
        if self.config.dropout:  # they depend on a sequence's place in the global batch alone
            keys = random_bits(self.config.seed, number, self.world.rank * n_rows + np.arange(n_rows)).astype(np.int64)
        has_fixed_shapes = self.forward.is_compiled or self._is_captured
        needs_mask = has_fixed_shapes and not self.config.packing
        loss = torch.zeros((), device=self.device)
        n_at_a_time = rows_at_a_time(n_rows, self.sizes.micro_batch, self.config)
        for part, rows in micro_batches(masked, n_at_a_time, is_filled=has_fixed_shapes):
            inputs = self.forward.send(part, None if keys is None else keys[rows], needs_mask)
            loss += cast(Tensor, self._backward(inputs, n_slots))
        return loss

    def _backward_of(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        dropout_keys: Tensor | None,
        labels: Tensor,
        n_slots: int,
    ) -> Tensor:
        """Accumulate the gradients of a micro-batch, and return its share of the loss, []."""
        inputs = Inputs(input_ids, attention_mask, positions, dropout_keys, labels)
        # no name for what the forward pass returns: the backward pass needs its memory
        loss = masked_loss(
            *self.forward(inputs, may_compile=True),
            n_slots,
            self.forward.dtype,
            self.forward.is_compiled,
            self.forward.varies,
        )
        loss.backward()
        return loss.detach()

    def _clip_and_update(self, losses: Tensor, scale: float, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Return the scaled losses, [W], and the gradient norm, []. After running out of memory, repeat the update."""
        numbers = torch.tensor([scale, learning_rate], dtype=torch.float64)
        if self._is_captured:
            numbers = send(numbers.float().numpy(), self.device)
        done = self.sizes.within_memory(lambda: self._update((losses, numbers)))
        while done is None:
            self.world.report_shortage()
            done = self.sizes.within_memory(lambda: self._finish_update(losses, numbers))
        return cast(tuple[Tensor, Tensor], done)

    def _update_by(self, losses: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """losses: [W]. numbers: [2], the scale and the learning rate."""
        self._clipped = None
        return self._finish_update(losses, numbers)

    def _finish_update(self, losses: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Clip, unless that is done already, and take the optimizer step."""
        scale, learning_rate = numbers if self._is_captured else numbers.tolist()
        if self._clipped is None:
            self._clipped = self.gradients.clip(losses, scale, self.config.grad_clip, self._is_broken)
        self.optimizer.step(learning_rate, self._is_broken)
        clipped, self._clipped = self._clipped, None
        return clipped

    def _ran_short(self, where: str, ranks: list[int]) -> None:
        self.sizes.halve_micro_batch(where, ranks)
        self.forward.compile()

    def _stop_capturing(self) -> None:
        self._backward.turn_off()
        self._update.turn_off()


def micro_batches(masked: MaskedBatch, size: int, is_filled: bool = False) -> Iterator[tuple[MaskedBatch, np.ndarray]]:
    """Yield the batch in parts of at most `size` sequences, each with its row numbers in the batch.

    is_filled: fill up the last part, so that all have one shape, with its last row repeated without labels.
    """
    n_rows = len(masked.labels)
    for start in range(0, n_rows, size):
        wanted = np.arange(start, start + size if is_filled else min(start + size, n_rows))
        rows = np.minimum(wanted, n_rows - 1)
        labels = np.where(wanted[:, None] < n_rows, masked.labels[rows], IGNORED)
        yield MaskedBatch(masked.input_ids[rows], masked.positions[rows], labels), rows
