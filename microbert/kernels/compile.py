"""Compiled code: kernels in C for what PyTorch computes slowly on a CPU, each in a file .c beside the module that calls
it; and torch.compile.

A kernel in C is compiled at its first use, in less than a second and anew in each process: it fits the processor that
it runs on, and nothing of it stays on the disk. Without a compiler PyTorch computes the same. What torch.compile makes
takes longer, so it stays in the user's cache.
"""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from microbert.runtime.device import find_compiler

KERNELS = Path(__file__).parent  # the folder of the C files
# the last two let square roots and rounding be instructions; what else -ffast-math stands for would lose NaN, or denormals in all of the process
# -pipe: the assembler's text, twice as long as the library, is no file that could be too long for `ulimit -f` where the library is not
FLAGS = ("-O3", "-march=native", "-pipe", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")


@functools.cache
def compiled_kernel(source: Path, **constants: int) -> ctypes.CDLL | None:
    """The functions of the source, with those constants; None where it cannot be compiled or loaded."""
    compiler = find_compiler()
    if compiler is None:
        return None
    defined = [f"-D{name}={value}" for name, value in constants.items()]
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library = Path(folder) / "kernel.so"
            command = [compiler, *FLAGS, *defined, "-o", library, source, "-lm"]
            subprocess.run(
                command, check=True, capture_output=True, start_new_session=True
            )  # so that a signal to stop the run does not stop it
            return ctypes.CDLL(str(library))
    except (
        OSError,
        subprocess.CalledProcessError,
    ):  # no OpenMP, say, a full disk, or a folder from which nothing may be run
        return None


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Of its first number; NULL for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def n_threads() -> ctypes.c_int:
    """Those that PyTorch computes with, as a kernel takes them."""
    return ctypes.c_int(torch.get_num_threads())
