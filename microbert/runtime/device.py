"""The device of a process: which one, how much memory it has, and how to compute on it.

All choices that depend on the kind of device are here: dtype, compilation, CUDA graphs, transfers, memory limit.
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
from microbert.config.terminal import counted
from microbert.errors import InputError
from microbert.runtime.distributed import World

GIB = 2**30
# in the messages of the CPU, Windows, MPS and CUDA's libraries
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")
NARROWEST_IN_BF16 = 64  # n_embed, on CPUs; a step at 128 took two thirds of the time of fp32
# as torch.cpu.get_capabilities names them; AMD's CPUs have the latter from Zen 4 on
UNITS_FOR_BF16 = ("amx_bf16", "avx512_bf16")
COMPILERS = ("cc", "gcc", "clang")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes, or "max"
PROCESS_STATUS = Path("/proc/self/status")


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str, world: World) -> torch.device:
    """Return the device for this process, and set it up.

    name: the constant `device`; "auto" chooses CUDA, else MPS, else the CPU. Several processes on one machine use one
    GPU each, or share its cores. Raises InputError if the device is not available.
    """
    if name == "auto":
        has_mps = torch.backends.mps.is_available() and world.size == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    device = torch.device(name)
    if world.size > 1 and (device.type == "mps" or device.index is not None):
        raise InputError(
            f'device = "{name}" is a single device, but torchrun started {world.size} processes: use "cuda", "cpu" or '
            '"auto"'
        )
    if device.type == "cuda":
        return _choose_gpu(device, world)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError('device = "mps", but PyTorch finds no Apple GPU here: use device = "auto" or "cpu"')
    # torchrun sets one thread if the user sets none
    if device.type == "cpu" and world.local_size > 1 and world.has_one_thread:
        torch.set_num_threads(max(1, n_cores() // world.local_size))
    return device


def _choose_gpu(device: torch.device, world: World) -> torch.device:
    if not torch.cuda.is_available():
        raise InputError('device = "cuda", but PyTorch finds no CUDA GPU here: use device = "auto" or "cpu"')
    n_gpus = torch.cuda.device_count()
    if world.size > 1 and world.local_size > n_gpus:
        raise InputError(
            f"{world.local_size} processes on a machine where PyTorch finds {counted(n_gpus, 'GPU')}: start one per GPU"
        )
    # an explicit number, because PyTorch's settings of a device require it
    chosen = torch.device("cuda", world.local_rank if world.size > 1 else device.index or 0)
    if chosen.index >= n_gpus:
        raise InputError(f'device = "{device}", but PyTorch finds {counted(n_gpus, "GPU")} here, numbered from 0')
    torch.cuda.set_device(chosen)
    return chosen


def describe_device(device: torch.device, world: World) -> str:
    """Return the device for people: "cpu (2 threads)", or "8 processes, NVIDIA H100 each"."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        described = f"{device} ({gpu})" if world.size == 1 else f"{gpu} each"
    elif device.type == "cpu":
        described = f"cpu ({counted(torch.get_num_threads(), 'thread')})"
    else:
        described = str(device)
    return described if world.size == 1 else f"{world.size} processes, {described}"


def describe_compute(config: Config, device: torch.device) -> str:
    """Return those of ", in bf16, compiled, with CUDA graphs" that apply; "" for plain fp32."""
    choices = {
        ", in bf16": compute_dtype(config, device) == torch.bfloat16,
        ", compiled": is_compiled(config, device),
        ", with CUDA graphs": is_captured(config, device),
    }
    return "".join(text for text, applies in choices.items() if applies)


def memory_bytes(device: torch.device, world: World) -> int | None:
    """Return the memory available to this process: its GPU's, or its share of the machine's. None if unknown."""
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
    """On CUDA, let PyTorch's allocator raise OutOfMemoryError above this limit. Other devices have no limit."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes / total), device)


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process in GB: on CUDA what PyTorch's allocator reserved, else its RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    with contextlib.suppress(OSError):  # Linux, where getrusage may return the peak of the parent process
        if peak := re.search(r"VmHWM:\s*(\d+)", PROCESS_STATUS.read_text()):
            return 1024 * int(peak[1]) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


def out_of_memory(error: BaseException) -> str:
    """Return one line if the error is PyTorch's for a device without free memory, else ""."""
    text = str(error).strip()
    is_shortage = isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or any(words in text for words in OUT_OF_MEMORY)
    )
    return " ".join(text.split())[:200] if is_shortage else ""


def free_memory(device: torch.device) -> None:
    """Return unused cached memory to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def has_bf16(device: torch.device) -> bool:
    """Return whether bf16 is fast on the device for any shape: NVIDIA GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def fastest_dtype(n_embed: int, device: torch.device) -> torch.dtype:
    """Return the fastest matmul dtype for this width: bf16 also on CPUs with units for it, if n_embed is not small."""
    is_bf16 = has_bf16(device) or (device.type == "cpu" and n_embed >= NARROWEST_IN_BF16 and cpu_multiplies_bf16())
    return torch.bfloat16 if is_bf16 else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Return whether the CPU has matmul units for bf16. False if this version of PyTorch does not report them."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(unit, False) for unit in UNITS_FOR_BF16)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products. Weights stay in fp32."""
    return fastest_dtype(config.n_embed, device) if config.dtype == "auto" else getattr(torch, config.dtype)


def autocast(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    """Compute matrix products in this dtype, as torch.autocast does. Weights stay in fp32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def is_compiled(config: Config, device: torch.device) -> bool:
    """Return whether to use torch.compile. By default: on CUDA, where Triton and a C compiler are installed."""
    if config.torch_compile is not None:
        return config.torch_compile
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and find_compiler() is not None
        and torch.cuda.get_device_capability(device) >= (7, 0)
    )


def is_captured(config: Config, device: torch.device) -> bool:
    """Return whether to capture and replay steps as CUDA graphs."""
    return config.cuda_graphs and device.type == "cuda"


def find_compiler() -> str | None:
    """Return the path of a C compiler, or None."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def is_real_on_cpu(x: torch.Tensor) -> bool:
    """Return whether x has data in CPU memory: it is not a fake tensor, and torch.compile is not tracing."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu" and not torch.compiler.is_compiling()
    )


def is_for_kernels(*tensors: torch.Tensor) -> bool:
    """Return whether the C kernels of this package can process the tensors: on a CPU, in fp32."""
    return all(is_real_on_cpu(x) and x.dtype == torch.float32 for x in tensors) and not torch.is_autocast_enabled("cpu")


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device. On CUDA the copy is from pinned memory, after queued work, without waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class HostCopy:
    """An asynchronous copy of a device tensor. `read` waits for the copy only, not for work queued after it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        is_cuda = tensor.device.type == "cuda"
        self._copy = tensor.to("cpu", non_blocking=is_cuda)
        self._event = torch.cuda.current_stream(tensor.device).record_event() if is_cuda else None

    def read(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        return self._copy.numpy()
