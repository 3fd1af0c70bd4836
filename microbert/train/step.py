"""One update from one batch: micro-batches, what the processes agree on, the sum of their gradients, clipping.

No process sends gradients while another can still run out of memory: each adds up its micro-batches alone, then all
tell how that went, then they reduce. A process that runs out of memory in the update has changed no weight yet: it
reports that when the others gather next, all use less memory from then on, and it repeats the update. And none waits
for its device: what a step gives is read when the next one is under way. Shapes: B sequences of a process's batch, T =
max_seq_len, M masked slots a sequence, W processes.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from microbert.config.constants import Config
from microbert.data.masking import IGNORED, MaskedBatch
from microbert.data.tokenizer import PAD_ID
from microbert.errors import Diverged, Failed
from microbert.model.layers import MaskedLanguageModel
from microbert.model.loss import masked_loss
from microbert.runtime.counter_rng import random_bits
from microbert.runtime.cuda_graph import Captured
from microbert.runtime.device import (
    HostCopy,
    autocast,
    compute_dtype,
    free_memory,
    is_captured,
    is_compiled,
    out_of_memory,
    send,
)
from microbert.runtime.distributed import World
from microbert.runtime.torch_compile import compiled
from microbert.train.memory import GB, Hardware, planned_training_bytes
from microbert.train.optim import Optimizer

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_

T = TypeVar("T")


class Step:
    """A step that was taken. number: from 0. stopping: the ranks that were told to stop. time_used: as the first process gave it."""

    def __init__(
        self, number: int, losses: torch.Tensor, grad_norm: torch.Tensor, stopping: list[int], time_used: float
    ) -> None:
        """losses: [W], each process's share of the mean loss of all masked tokens, in nats. grad_norm: [], before clipping."""
        self.number, self.stopping, self.time_used = number, stopping, time_used
        self._numbers = HostCopy(torch.cat([losses, grad_norm[None]]))

    def read(self) -> tuple[float, float]:
        """The mean loss in nats a masked token, and the gradient's norm before clipping.

        Raises Diverged, in all processes, when one of them is not finite: then this step was not applied, nor any after it.
        """
        *losses, grad_norm = self._numbers.read().tolist()
        loss = sum(losses)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            rank = None if math.isfinite(loss) else int(np.argmin(np.isfinite(losses)))
            where = f" (in process {rank} of {len(losses)})" if len(losses) > 1 and rank is not None else ""
            raise Diverged(
                f"step {self.number}: the loss is {loss:g}{where} and the gradient's norm {grad_norm:g}, so this step was not applied. The last "
                "checkpoint is from before it. A lower learning_rate or a lower grad_clip usually helps",
                rank,
            )
        return loss, grad_norm


class Learner:
    """A model with its optimizer, and how it learns on its device, as one of the processes of `world`.

    micro_batch_size: sequences computed at a time; halved in all processes when one runs out of memory, and `ran_short`
    is True from then on. Then nothing is recorded any more: a recording holds its memory, and evaluation needs some
    beside it. evaluation_batch_size: sequences evaluated at a time, never more; halved alone when evaluation runs out
    of memory. number: of the current step, for messages.
    """

    def __init__(self, model: MaskedLanguageModel, config: Config, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        self.device = model.output_bias.device
        self._dtype, self._is_compiled, self._is_captured = (
            compute_dtype(config, self.device),
            is_compiled(config, self.device),
            is_captured(config, self.device),
        )
        self.optimizer = Optimizer(model, config, self._is_captured)
        self.micro_batch_size, self.ran_short = (
            min(config.micro_batch_size or config.batch_size, config.batch_size),
            False,
        )
        self.evaluation_batch_size, self.number = self.micro_batch_size, 0
        self._forward = self._compiled()
        self._learn = Captured(self._learn_from, self.device, self._is_captured)
        self._update = Captured(self._update_by, self.device, self._is_captured)
        if self._is_captured:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)  # which stays where it is
        self._broken = torch.zeros((), device=self.device)  # 1 from the first step on whose numbers are not finite
        self._clipped: tuple[torch.Tensor, torch.Tensor] | None = (
            None  # losses and norm, while gradients are clipped and the weights not updated
        )
        self._shortage = ""  # what torch said when memory ran out
        world.on_shortage = functools.partial(self._ran_short, "in the update ")

    @property
    def _has_fixed_shapes(self) -> bool:
        return self._is_compiled or self._is_captured

    def _compiled(self) -> nn.Module:
        """The model as it is computed: where it is compiled, for the shapes that come now, those before forgotten."""
        if not self._is_compiled:
            return self.model
        torch.compiler.reset()
        return compiled(self.model, dynamic=False)

    def hidden(
        self, masked: MaskedBatch, dropout_keys: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the loss functions take: hidden [B * M, D], weight [V, D], bias [V], labels [B * M]. dropout_keys: int64 [B].

        Never compiled: for what is computed now and then, that would take longer than it saves.
        """
        return self._hidden_of(self.model, *self._send(masked, dropout_keys))

    def _send(
        self, masked: MaskedBatch, dropout_keys: np.ndarray | None, is_always_masked: bool = False
    ) -> tuple[torch.Tensor | None, ...]:
        """To the device: input_ids, attention_mask (None where there is no padding, unless it is always wanted), positions, dropout_keys, labels."""
        is_real = masked.input_ids != PAD_ID
        attention_mask = None if is_real.all() and not is_always_masked else is_real
        arrays = masked.input_ids, attention_mask, masked.positions, dropout_keys, masked.labels
        return tuple(None if array is None else send(array, self.device) for array in arrays)

    def _hidden_of(
        self,
        forward: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor,
        dropout_keys: torch.Tensor | None,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        with autocast(self._dtype, self.device):
            hidden = forward(input_ids, attention_mask, positions, dropout_keys)
        return hidden.float(), self.model.output_weight, self.model.output_bias, labels.reshape(-1)

    def step(
        self, masked: MaskedBatch, number: int, learning_rate: float, is_to_stop: bool = False, time_used: float = 0.0
    ) -> Step:
        """One update from one batch, of which `masked` is this process's share. is_to_stop, time_used: for the others to know.

        Raises Failed in all processes when one of them has no memory for a single sequence.
        """
        self.model.train()
        self.number = number
        if (
            self.ran_short or self._learn.is_on != self._update.is_on
        ):  # where one cannot be recorded, the other is not tried
            self._stop_capturing()
        while True:
            flat = self._add_up_micro_batches(masked, number)
            table, short_before = self.world.try_gather(masked.n_masked, is_to_stop, flat is None, time_used)
            n_masked, stopping, short, times = table.T  # [W] each
            if short_before:
                self.world.on_shortage(short_before)
            elif short.any():
                self._ran_short("", np.flatnonzero(short).tolist())
            else:
                break
            flat = None
        self.world.all_reduce(flat)
        self._take_gradients(flat)
        scale = masked.labels.size / max(1, n_masked.sum())
        numbers = torch.tensor([scale, learning_rate], dtype=torch.float64)
        if self._is_captured:
            numbers = send(numbers.float().numpy(), self.device)
        losses, grad_norm = self._apply(flat[-self.world.size :], numbers)
        return Step(number, losses, grad_norm, np.flatnonzero(stopping).tolist(), times[0])

    def is_finite(self) -> bool:
        """Whether all weights are numbers still: those of every process, for they are the same. Waits for the device."""
        return bool(torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all())

    def _add_up_micro_batches(self, masked: MaskedBatch, number: int) -> torch.Tensor | None:
        """This process's gradients, as if each slot held a masked token, and behind them its loss among W zeros; None when memory has run out.

        A process that is alone gives its loss only: its gradients need not be sent.
        """
        self._forget_gradients()
        flat = self.within_memory(lambda: self._flat(self._backward(masked, number)))
        if flat is None:
            self._forget_gradients()
            free_memory(self.device)
        return flat

    def within_memory(self, work: Callable[[], T]) -> T | None:
        """What `work` returns, which is not None; None when memory has run out in it."""
        self._shortage = ""
        try:
            return work()
        except RuntimeError as error:
            self._shortage = out_of_memory(error)
            if not self._shortage:
                raise
        free_memory(self.device)  # only here, where the error no longer holds the tensors of the work
        return None

    def _forget_gradients(self) -> None:
        if self._is_captured:
            torch._foreach_zero_([parameter.grad for parameter in self.model.parameters()])
        else:
            self.optimizer.zero_grad()

    def _stop_capturing(self) -> None:
        self._learn.turn_off()
        self._update.turn_off()

    def _backward(self, masked: MaskedBatch, number: int) -> torch.Tensor:
        """Leaves the gradients in the parameters, and returns the loss: []."""
        n_slots, n_rows = masked.labels.size, len(masked.labels)
        keys = None
        if self.config.dropout:  # of each sequence by its place in the batch of all processes
            keys = random_bits(self.config.seed, number, self.world.rank * n_rows + np.arange(n_rows)).astype(np.int64)
        is_always_masked = (
            self._has_fixed_shapes and not self.config.packing
        )  # so that one way is compiled and recorded
        loss = torch.zeros((), device=self.device)
        for part, rows in micro_batches(masked, self.micro_batch_size, is_filled=self._has_fixed_shapes):
            loss += self._learn(self._send(part, None if keys is None else keys[rows], is_always_masked), n_slots)
        return loss

    def _learn_from(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor,
        dropout_keys: torch.Tensor | None,
        labels: torch.Tensor,
        n_slots: int,
    ) -> torch.Tensor:
        """Adds to the gradients what a micro-batch gives, and returns its share of the loss: []."""
        is_usual = (
            attention_mask is None
        ) == self.config.packing  # with packing, one sequence of the corpus has padding
        forward = self._forward if is_usual else self.model
        share = masked_loss(
            *self._hidden_of(forward, input_ids, attention_mask, positions, dropout_keys, labels),
            n_slots,
            self._dtype,
            self._is_compiled,
        )
        share.backward()
        return share.detach()

    def _flat(self, loss: torch.Tensor) -> torch.Tensor:
        losses = torch.zeros(self.world.size, device=self.device)
        losses[self.world.rank] = loss
        if self.world.size == 1:
            return losses
        return torch.cat([*(parameter.grad.reshape(-1) for parameter in self.model.parameters()), losses])

    def _take_gradients(self, flat: torch.Tensor) -> None:
        """Those of all processes, out of what `_flat` gives."""
        if self.world.size == 1:
            return
        parameters = list(self.model.parameters())
        parts = [
            part.view_as(parameter)
            for parameter, part in zip(
                parameters, flat.split([parameter.numel() for parameter in parameters] + [self.world.size])
            )
        ]
        if self._is_captured:
            torch._foreach_copy_([parameter.grad for parameter in parameters], parts)
        else:
            for parameter, part in zip(parameters, parts):
                parameter.grad = part

    def _apply(self, losses: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The update, as `_update_by`; repeated where memory runs out, once all processes use less of it."""
        done = self.within_memory(lambda: self._update((losses, numbers)))
        while done is None:
            self.world.report_shortage()
            done = self.within_memory(lambda: self._repeat_update(losses, numbers))
        return done

    def _update_by(self, losses: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips and updates. losses: [W]. numbers: [2], what makes a mean over the masked tokens of all processes, and the learning rate. Returns losses and norm, scaled."""
        self._clipped = None
        return self._repeat_update(losses, numbers)

    def _repeat_update(self, losses: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_update_by`, from where memory ran out in it."""
        scale, learning_rate = numbers if self._is_captured else numbers.tolist()
        if self._clipped is None:
            self._clipped = self._clip(losses, scale)
        self.optimizer.step(learning_rate, self._broken)
        clipped, self._clipped = self._clipped, None
        return clipped

    def _clip(self, losses: torch.Tensor, scale: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and clips the gradients, once all memory is taken that it needs: they are not to be scaled twice."""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        grad_norm = scale * get_total_norm(gradients)
        losses = scale * losses
        factor = scale * torch.clamp((self.config.grad_clip or math.inf) / (grad_norm + CLIP_EPS), max=1.0)
        is_finite = torch.isfinite(losses.sum()) & torch.isfinite(grad_norm)
        self._broken.copy_(torch.maximum(self._broken, (~is_finite).to(self._broken.dtype)))
        torch._foreach_mul_(gradients, factor)
        return losses, grad_norm

    def _ran_short(self, where: str, ranks: list[int]) -> None:
        self.micro_batch_size = self._halved(self.micro_batch_size, where, ranks)
        self.evaluation_batch_size = min(self.evaluation_batch_size, self.micro_batch_size)
        self._forward = self._compiled()

    def ran_short_in_evaluation(self, ranks: list[int]) -> None:
        """To be called in all processes: those of `ranks` have run out of memory.

        Raises Failed where nothing is left to give up.
        """
        self.evaluation_batch_size = self._halved(self.evaluation_batch_size, "in evaluation ", ranks)

    def _halved(self, size: int, where: str, ranks: list[int]) -> int:
        """Half the size, for all processes, where those of `ranks` have run out of memory. Recordings are dropped.

        Raises Failed where there is neither a smaller size nor anything recorded.
        """
        reason = ": ".join(
            filter(None, (f"process {ranks[0]} of {self.world.size}" * (self.world.size > 1), self._shortage))
        )
        if size == 1 and self.ran_short:
            config = dataclasses.replace(self.config, micro_batch_size=1)
            hardware = Hardware(self.device.type, None, self.world.size)
            planned = planned_training_bytes(config, self.model.config.vocab_size, hardware)
            raise Failed(
                f"step {self.number}: out of memory {where}with one sequence of {config.max_seq_len} tokens at a time, "
                f"for which about {planned / GB:.2f} GB are planned ({reason}). A smaller max_seq_len, vocab_size, "
                "n_embed or n_layers takes less",
                ranks[0],
            )
        self.ran_short, half = True, -(-size // 2)
        self._stop_capturing()
        if self.world.rank == ranks[0]:  # which knows what torch said
            sequences = f"{size} sequence{'s' * (size > 1)} of {self.config.max_seq_len} tokens at a time"
            print(
                f"\nstep {self.number}: out of memory {where}with {sequences} ({reason}); repeated with {half} at a time, as "
                "is all that follows",
                file=sys.stderr,
            )
        return half


def micro_batches(masked: MaskedBatch, size: int, is_filled: bool = False) -> Iterator[tuple[MaskedBatch, np.ndarray]]:
    """The batch in parts of at most `size` sequences, each with the numbers of its rows.

    is_filled: the last one has as many as the others, for the sake of fixed shapes. What fills it repeats its last row, without labels.
    """
    n_rows = len(masked.labels)
    for start in range(0, n_rows, size):
        wanted = np.arange(start, start + size if is_filled else min(start + size, n_rows))
        rows = np.minimum(wanted, n_rows - 1)
        yield (
            MaskedBatch(
                masked.input_ids[rows],
                masked.positions[rows],
                np.where(wanted[:, None] < n_rows, masked.labels[rows], IGNORED),
            ),
            rows,
        )
