"""Capture and replay GPU work as a CUDA graph.

A step of a small model is hundreds of kernels of microseconds each, and launching one from Python takes longer than the
kernel itself. A graph launches all of them at once.
"""

import sys
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from microbert.runtime.device import free_memory

WARM_UP = 2  # calls before the capture: libraries and compilers initialise in the first

Tensors = Tensor | tuple[Tensor, ...]


class Captured:
    """A function of tensors and constants that is captured after WARM_UP successive calls with equal signatures.

    The signature is the constants and the shapes and dtypes of the tensors. Later calls with it replay the graph.
    The function may also write to other tensors. All tensors that it reads or writes must keep their addresses, and
    its results are overwritten by the next call. It must not wait for the device. A graph owns all memory that the
    function uses, so that another signature discards it. If the capture fails, capturing is turned off.
    """

    def __init__(self, function: Callable[..., Tensors], device: torch.device, is_on: bool) -> None:
        """is_on: False never captures."""
        self._function, self._device, self.is_on = function, device, is_on
        self._replay: Callable[[], Tensors] | None = None
        self._signature: tuple[Hashable, ...] = ()  # of the last call
        self._n_calls = 0  # with that signature, in succession
        self._inputs: tuple[Tensor | None, ...] = ()  # the tensors that the graph reads

    @property
    def has_graph(self) -> bool:
        return self._replay is not None

    def __call__(self, tensors: tuple[Tensor | None, ...], *constants: Hashable) -> Tensors:
        if not self.is_on:
            return self._function(*tensors, *constants)
        signature = (*constants, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors))
        if signature != self._signature:
            self.forget()
        self._signature, self._n_calls = signature, self._n_calls + 1
        if self._replay is None and self._n_calls > WARM_UP:
            self._capture(tensors, constants)
        if self._replay is None:
            return self._function(*tensors, *constants)
        for static, tensor in zip(self._inputs, tensors, strict=True):
            if static is not None and tensor is not None:
                static.copy_(tensor)
        return self._replay()

    def _capture(self, tensors: tuple[Tensor | None, ...], constants: tuple[Hashable, ...]) -> None:
        self._inputs = tuple(None if tensor is None else tensor.clone() for tensor in tensors)
        try:
            self._replay = capture(lambda: self._function(*self._inputs, *constants))
        except RuntimeError as error:
            self.turn_off()
            print(
                f"\nhint: a step could not be captured as a CUDA graph ({' '.join(str(error).split())[:200]}). The run "
                "continues without CUDA graphs, more slowly. If that fails too, set cuda_graphs = False",
                file=sys.stderr,
            )

    def forget(self) -> None:
        """Discard the graph and free its memory."""
        if self._replay is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a replay may be running
            self._replay = None
            free_memory(self._device)
        self._inputs, self._n_calls = (), 0

    def turn_off(self) -> None:
        """Discard the graph and never capture again."""
        self.forget()
        self.is_on = False


def capture(function: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """Capture the function without computing it. Return a function that computes it into the same tensors each time.

    Raises RuntimeError where CUDA cannot capture it.
    """
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as nccl's, may query the device meanwhile. The outer context restores the
    # current stream, which PyTorch does not when a capture fails.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()

    def replay() -> Tensors:
        graph.replay()
        return result

    return replay
