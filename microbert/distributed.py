"""What one process needs of its surroundings: the device, and the check that it is alone."""

import os

import torch

from .config import InputError


def choose_device(name: str) -> torch.device:
    """name: the constant `device`. "auto" takes CUDA, else Apple's MPS, else the CPU. Raises InputError where it is missing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("this script trains in one process: start it with python, not with torchrun")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError('device = "cuda", but PyTorch sees no CUDA GPU here; use device = "auto" or "cpu"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f'device = "{name}", but there are {torch.cuda.device_count()} GPUs, counted from 0')
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError('device = "mps", but PyTorch sees no Apple GPU here; use device = "auto" or "cpu"')
    return device


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held so far, in GB: of the GPU on CUDA, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if os.uname().sysname == "Darwin" else peak * 1024 / 1e9
