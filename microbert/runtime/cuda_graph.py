"""Capture and replay GPU work as a CUDA graph.

A step of a small model is hundreds of kernels of microseconds each, and launching one from Python takes longer than the
kernel itself. A graph launches all of them at once.
"""

import dataclasses
import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from microbert.runtime.device import free_memory

WARM_UP = 2  # calls before the capture: libraries and compilers initialise in the first

Tensors = Tensor | tuple[Tensor, ...]


@dataclasses.dataclass
class _Graph:
    """The calls with one signature. inputs: the tensors that `replay` reads; both are set by the capture."""

    n_calls: int = 0
    inputs: tuple[Tensor | None, ...] = ()
    replay: Callable[[], Tensors] | None = None


class Captured:
    """A function of tensors and constants that is captured after WARM_UP calls with equal signatures.

    The signature is the constants and the shapes and dtypes of the tensors. Later calls with it replay the graph.
    The function may also write to other tensors. All tensors that it reads or writes must keep their addresses, and
    its results are overwritten by the next call, with any signature. It must not wait for the device. The graphs share
    the memory that the function uses, and own it. One signature more than n_signatures discards all of them. If a
    capture fails, capturing is turned off.
    """

    def __init__(
        self, function: Callable[..., Tensors], device: torch.device, is_on: bool, n_signatures: int = 1
    ) -> None:
        """is_on: False never captures."""
        self._function, self._device, self.is_on, self._n_signatures = function, device, is_on, n_signatures
        self._graphs: dict[tuple[Hashable, ...], _Graph] = {}  # by signature
        self._pool: Any = None  # the memory of all graphs, from the first capture on

    @property
    def has_graph(self) -> bool:
        return any(graph.replay is not None for graph in self._graphs.values())

    def __call__(self, tensors: tuple[Tensor | None, ...], *constants: Hashable) -> Tensors:
        if not self.is_on:
            return self._function(*tensors, *constants)
        signature = (*constants, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors))
        if signature not in self._graphs and len(self._graphs) >= self._n_signatures:
            self.forget()
        graph = self._graphs.setdefault(signature, _Graph())
        graph.n_calls += 1
        if graph.replay is None and graph.n_calls > WARM_UP:
            self._capture(graph, tensors, constants)
        if graph.replay is None:
            return self._function(*tensors, *constants)
        for static, tensor in zip(graph.inputs, tensors, strict=True):
            if static is not None and tensor is not None:
                static.copy_(tensor)
        return graph.replay()

    def _capture(self, graph: _Graph, tensors: tuple[Tensor | None, ...], constants: tuple[Hashable, ...]) -> None:
        if self._pool is None and self._device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        inputs = graph.inputs = tuple(None if tensor is None else tensor.clone() for tensor in tensors)
        try:
            graph.replay = capture(lambda: self._function(*inputs, *constants), self._pool)
        except RuntimeError as error:
            graph.inputs = ()
            self.turn_off()
            print(
                f"\nhint: a step could not be captured as a CUDA graph ({' '.join(str(error).split())[:200]}). The run "
                "continues without CUDA graphs, more slowly. If that fails too, set cuda_graphs = False",
                file=sys.stderr,
            )

    def forget(self) -> None:
        """Discard the graphs and free their memory."""
        had_graph = self.has_graph
        if had_graph and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a replay may be running
        self._graphs.clear()
        self._pool = None  # PyTorch may still hold it, and does not accept it again
        if had_graph:
            free_memory(self._device)

    def turn_off(self) -> None:
        """Discard the graphs and never capture again."""
        self.forget()
        self.is_on = False


def capture(function: Callable[[], Tensors], pool: Any = None) -> Callable[[], Tensors]:
    """Capture the function without computing it. Return a function that computes it into the same tensors each time.

    pool: of memory, shared with other graphs that never run at the same time; None for one of its own. Raises
    RuntimeError where CUDA cannot capture it.
    """
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as nccl's, may query the device meanwhile. The outer context restores the
    # current stream, which PyTorch does not when a capture fails.
    capturing = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    with torch.cuda.stream(torch.cuda.current_stream()), capturing:
        result = function()

    def replay() -> Tensors:
        graph.replay()
        return result

    return replay
