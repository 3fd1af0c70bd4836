"""The device that a process computes on: which it is, what it holds, and how it computes there.

All choices that depend on the kind of device stand here: dtype, compilation, recording, the way of data to it, the limit of its memory.
"""

import contextlib
import importlib.util
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from microbert.config.constants import Config
from microbert.errors import InputError
from microbert.runtime.distributed import World

GIB = 2**30
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
)  # of the CPU, Windows, MPS, CUDA's libraries
NARROWEST_IN_BF16 = 64  # n_embed, on CPUs; measured is 128, where a step takes two thirds of the time
UNITS_FOR_BF16 = (
    "amx_bf16",
    "avx512_bf16",
)  # of CPUs, as torch.cpu.get_capabilities calls them; AMD's have the latter from Zen 4 on
COMPILERS = ("cc", "gcc", "clang")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes, or "max"
PROCESS_STATUS = Path("/proc/self/status")


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str, world: World) -> torch.device:
    """name: the constant `device`. "auto" takes CUDA, else Apple's MPS, else the CPU. Raises InputError where it is missing.

    Several processes on one machine take a GPU each, or share its cores.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available() and world.size == 1
            else "cpu"
        )
    device = torch.device(name)
    if world.size > 1 and (device.type == "mps" or device.index is not None):
        raise InputError(
            f'device = "{name}" is one device, and torchrun has started {world.size} processes: use "cuda", "cpu" or "auto"'
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError('device = "cuda", but PyTorch sees no CUDA GPU here; use device = "auto" or "cpu"')
    if device.type == "cuda":
        if world.size > 1 and world.local_size > torch.cuda.device_count():
            raise InputError(
                f"{world.local_size} processes on a machine where PyTorch sees {torch.cuda.device_count()} GPUs: start one for each GPU"
            )
        device = torch.device(
            "cuda", world.local_rank if world.size > 1 else device.index or 0
        )  # torch's settings of a device want its number
        if device.index >= torch.cuda.device_count():
            raise InputError(f'device = "{name}", but there are {torch.cuda.device_count()} GPUs, counted from 0')
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError('device = "mps", but PyTorch sees no Apple GPU here; use device = "auto" or "cpu"')
    if (
        device.type == "cpu" and world.local_size > 1 and world.one_thread_asked
    ):  # torchrun asks for one thread where nobody says how many
        torch.set_num_threads(max(1, n_cores() // world.local_size))
    return device


def describe_device(device: torch.device, world: World) -> str:
    if device.type == "cuda":
        one = (
            f"{device} ({torch.cuda.get_device_name(device)})"
            if world.size == 1
            else f"{torch.cuda.get_device_name(device)} each"
        )
    else:
        one = (
            f"cpu ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)})"
            if device.type == "cpu"
            else str(device)
        )
    return one if world.size == 1 else f"{world.size} processes, {one}"


def describe_compute(config: Config, device: torch.device) -> str:
    """ ", in bf16, compiled, as CUDA graphs", so far as it is; "" for fp32 as it stands."""
    return (
        ", in bf16" * (compute_dtype(config, device) == torch.bfloat16)
        + ", compiled" * is_compiled(config, device)
        + ", as CUDA graphs" * is_captured(config, device)
    )


def memory_bytes(device: torch.device, world: World) -> int | None:
    """What the process may use at most: all of its GPU, or its share of the machine's memory. None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    with contextlib.suppress(OSError, ValueError):
        machine = min(machine, int(CGROUP_LIMIT.read_text()))
    return machine // world.local_size


def limit_memory(device: torch.device, n_bytes: float) -> None:
    """On CUDA, no tensor can take the process's allocator above this: it raises OutOfMemoryError instead. Elsewhere there is no such limit."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes / memory_bytes(device, World({}))), device)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held so far, in GB: on CUDA of the GPU, as PyTorch's allocator took it; else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    with contextlib.suppress(
        OSError, TypeError
    ):  # Linux; getrusage would count what the process that started this one held
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", PROCESS_STATUS.read_text())[1]) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


def out_of_memory(error: BaseException) -> str:
    """One line when the error is what torch raises when a device has no memory left, "" when it is another."""
    text = str(error).strip()
    is_one = isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or any(words in text for words in OUT_OF_MEMORY)
    )
    return " ".join(text.split())[:200] if is_one else ""


def free_memory(device: torch.device) -> None:
    """Gives back what no tensor holds any more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is what the device is fast in, whatever the shape: on NVIDIA's GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def fastest_dtype(n_embed: int, device: torch.device) -> torch.dtype:
    """In which a model so wide is multiplied soonest: bf16 also on a CPU with units for it, if matrices are not narrow."""
    is_bf16 = has_bf16(device) or (device.type == "cpu" and n_embed >= NARROWEST_IN_BF16 and cpu_multiplies_bf16())
    return torch.bfloat16 if is_bf16 else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has units for it. A torch that does not tell is taken for one on a CPU without."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(unit, False) for unit in UNITS_FOR_BF16)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """In which matrices are multiplied; the weights stay in fp32."""
    return fastest_dtype(config.n_embed, device) if config.dtype == "auto" else getattr(torch, config.dtype)


def multiplying_in(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    """Within it matrices are multiplied in that dtype, and so is what follows them until something in fp32 is added. Weights stay in fp32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def is_compiled(config: Config, device: torch.device) -> bool:
    """Whether torch.compile translates the model. Unasked on CUDA alone, and where what it needs is there: Triton and a C compiler."""
    if config.torch_compile is not None:
        return config.torch_compile
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and find_compiler() is not None
        and torch.cuda.get_device_capability(device) >= (7, 0)
    )


def is_captured(config: Config, device: torch.device) -> bool:
    """Whether steps are recorded as CUDA graphs and played back."""
    return config.cuda_graphs and device.type == "cuda"


def find_compiler() -> str | None:
    """The path of a C compiler, None where there is none."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def is_real_on_cpu(x: torch.Tensor) -> bool:
    """Whether the CPU is to compute with its numbers now, and not torch to look at its shape."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu" and not torch.compiler.is_compiling()
    )


def is_for_kernels(*tensors: torch.Tensor) -> bool:
    """Whether kernels of our own may compute with these: on a CPU and in fp32."""
    return all(is_real_on_cpu(x) and x.dtype == torch.float32 for x in tensors) and not torch.is_autocast_enabled("cpu")


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device. To CUDA it goes from pinned memory, behind the work that is queued there and without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Fetched:
    """Numbers on their way from the device: `read` waits for them alone, and not for the work that was queued later."""

    def __init__(self, numbers: torch.Tensor) -> None:
        is_cuda = numbers.device.type == "cuda"
        self._numbers = numbers.to("cpu", non_blocking=is_cuda)
        self._arrival = torch.cuda.current_stream(numbers.device).record_event() if is_cuda else None

    def read(self) -> np.ndarray:
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._numbers.numpy()
