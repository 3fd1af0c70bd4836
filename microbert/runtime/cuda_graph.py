"""Work for a GPU that is recorded once and played back: a CUDA graph.

A step of a small model is hundreds of kernels of microseconds each, and Python with the driver needs longer to start one than the GPU to compute it. A
graph starts all of them at once.
"""

import sys
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from microbert.runtime.device import free_memory

WARM_UP = 2  # calls before recording: libraries and compilers set themselves up in the first


class Captured:
    """A function of tensors and constants that is called as it is until arguments of one kind have come WARM_UP times in a row, and played back for that kind from then on.

    It may leave results in tensors beside those that it returns. All of them, and whatever else it reads, must stay where they are in memory; what it
    returns is overwritten by the next call. Nothing in it may wait for the device. A recording holds all the memory that the function takes, so arguments
    of another kind end it: what they take could not come on top. Where the function cannot be recorded, it is off from then on, and called as it is.
    """

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], device: torch.device, is_on: bool) -> None:
        """is_on: False never records."""
        self._function, self._device, self.is_on = function, device, is_on
        self._play: Callable[[], Tensor | tuple[Tensor, ...]] | None = None
        self._kind: tuple[Hashable, ...] = ()  # of the last call
        self._n_calls = 0  # of that kind, in a row
        self._places: tuple[Tensor | None, ...] = ()  # where the recording reads its arguments

    @property
    def has_recording(self) -> bool:
        return self._play is not None

    def __call__(self, tensors: tuple[Tensor | None, ...], *constants: Hashable) -> Tensor | tuple[Tensor, ...]:
        if not self.is_on:
            return self._function(*tensors, *constants)
        kind = (*constants, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors))
        if kind != self._kind:
            self.forget()
        self._kind, self._n_calls = kind, self._n_calls + 1
        if self._play is None and self._n_calls > WARM_UP:
            self._record(tensors, constants)
        if self._play is None:
            return self._function(*tensors, *constants)
        for place, tensor in zip(self._places, tensors):
            if place is not None:
                place.copy_(tensor)
        return self._play()

    def _record(self, tensors: tuple[Tensor | None, ...], constants: tuple[Hashable, ...]) -> None:
        self._places = tuple(None if tensor is None else tensor.clone() for tensor in tensors)
        try:
            self._play = record(lambda: self._function(*self._places, *constants))
        except RuntimeError as error:
            self.turn_off()
            print(
                f"\nhint: a step could not be recorded as a CUDA graph ({' '.join(str(error).split())[:200]}). The run goes on without, more slowly; if that fails too, "
                "cuda_graphs = False never tries",
                file=sys.stderr,
            )

    def forget(self) -> None:
        """Gives back what a recording holds."""
        if self._play is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # it may be playing
            self._play = None
            free_memory(self._device)
        self._places, self._n_calls = (), 0

    def turn_off(self) -> None:
        """Never records again."""
        self.forget()
        self.is_on = False


def record(function: Callable[[], Tensor | tuple[Tensor, ...]]) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """Calls the function without computing anything. What is returned computes it, and returns the same tensors every time. Raises RuntimeError where CUDA cannot."""
    graph = torch.cuda.CUDAGraph()
    # other threads, such as nccl's, may ask the device meanwhile; and where recording fails, torch leaves its stream the current one
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()

    def play() -> Tensor | tuple[Tensor, ...]:
        graph.replay()
        return result

    return play
