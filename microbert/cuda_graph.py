"""Work for a GPU that is recorded once and played back: a CUDA graph.

A step of a small model is a thousand kernels of microseconds each, and Python with the driver needs longer to start one than the GPU to compute it. A
graph starts all of them at once.
"""

import sys
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Pool = tuple[int, int]  # its name, to torch
WARM_UP = 2  # calls before recording: libraries and compilers set themselves up in the first


class Recorded:
    """A function of tensors and constants that is called as it is until arguments of one kind have come WARM_UP times in a row, and played back for that kind from then on.

    It may leave results in tensors beside those that it returns. All of them, and whatever else it reads, must stay where they are in memory; a result is
    overwritten by the next call, also of another function with the same pool. Nothing in it may wait for the device. Where it cannot be recorded, it goes on as it is.
    """

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], pool: Pool | None) -> None:
        """pool: of memory, for all that is never played back at the same time. None never records."""
        self._function, self._pool = function, pool
        self._play: Callable[[], Tensor | tuple[Tensor, ...]] | None = None
        self._kind: tuple[Hashable, ...] = ()  # of what is recorded, or of the last call
        self._n_calls = 0  # of that kind
        self._places: tuple[Tensor | None, ...] = ()  # where the recording reads its arguments

    def __call__(self, tensors: tuple[Tensor | None, ...], *constants: Hashable) -> Tensor | tuple[Tensor, ...]:
        if self._pool is None:
            return self._function(*tensors, *constants)
        kind = (*constants, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors))
        if self._play is None:
            self._n_calls = self._n_calls + 1 if kind == self._kind else 1
            self._kind = kind
            if self._n_calls > WARM_UP:
                self._record(tensors, constants)
        if self._play is None or kind != self._kind:
            return self._function(*tensors, *constants)
        for place, tensor in zip(self._places, tensors):
            if place is not None:
                place.copy_(tensor)
        return self._play()

    def _record(self, tensors: tuple[Tensor | None, ...], constants: tuple[Hashable, ...]) -> None:
        self._places = tuple(None if tensor is None else tensor.clone() for tensor in tensors)
        try:
            self._play = record(lambda: self._function(*self._places, *constants), self._pool)
        except RuntimeError as error:
            self._pool = None
            print(f"\nhint: the step could not be recorded as a CUDA graph, and goes on without, more slowly ({' '.join(str(error).split())[:200]})", file=sys.stderr)

    def forget(self) -> None:
        """The recording, and with it the memory that it holds."""
        self._play, self._kind, self._n_calls, self._places = None, (), 0, ()


def new_pool() -> Pool:
    """Of the GPU's memory."""
    return torch.cuda.graph_pool_handle()


def record(function: Callable[[], Tensor | tuple[Tensor, ...]], pool: Pool) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """Calls the function without computing anything. What is returned computes it, and returns the same tensors every time. Raises RuntimeError where CUDA cannot."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # other threads, such as nccl's, may ask the device meanwhile
        result = function()

    def play() -> Tensor | tuple[Tensor, ...]:
        graph.replay()
        return result

    return play
