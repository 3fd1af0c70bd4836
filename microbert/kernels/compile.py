"""Compile and load the C kernels. Their .c files are in this folder; model/loss.py calls loss.c.

A kernel is compiled at its first use, in one to three seconds, and saved in the user's cache for later processes. The
name of the saved file is a fingerprint of the sources, flags, constants, compiler and processor, because the code runs
only on the kind of processor that compiled it. The folder must be writable by its owner only; otherwise nothing is
saved, and each process compiles again. You can delete the folder at any time. Without a compiler, PyTorch computes the
same.
"""

import contextlib
import ctypes
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from microbert.config.environment import user_cache
from microbert.runtime.device import find_compiler
from microbert.runtime.files import fingerprint, private_folder, write_atomic

KERNELS = Path(__file__).parent  # the folder of the C files
# The last two flags compile square roots and rounding to instructions. The rest of -ffast-math would break NaN, or
# flush denormals in the whole process.
# -pipe: the assembly text, twice as long as the library, is never a file that `ulimit -f` could refuse.
FLAGS = ("-O3", "-march=native", "-pipe", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
CPU_INFO = Path("/proc/cpuinfo")
CPU_FIELDS = {"model name", "flags", "Features", "CPU implementer", "CPU variant", "CPU part"}  # of x86, then of Arm
DIGEST_SIZE = hashlib.sha256().digest_size


@functools.cache
def compiled_kernel(source: Path, **constants: int) -> ctypes.CDLL | None:
    """Return the library of a C file, with the constants as macros; None if it cannot be compiled or loaded."""
    compiler = find_compiler()
    if compiler is None:
        return None
    options = [*FLAGS, *(f"-D{name}={value}" for name, value in constants.items())]
    saved = _saved_file(source, compiler, options)
    with contextlib.suppress(OSError):  # missing, or built for another C library: compile it
        if saved is not None and _is_whole(saved):
            return ctypes.CDLL(str(saved))
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library = Path(folder) / "kernel.so"
            command = [compiler, *options, "-o", str(library), str(source), "-lm"]
            # a session of its own, so that a signal that stops the run does not stop the compiler
            subprocess.run(command, check=True, capture_output=True, start_new_session=True)
            kernel = ctypes.CDLL(str(library))
            if saved is not None:
                _save(library, saved)
            return kernel
    except (OSError, subprocess.CalledProcessError):  # no OpenMP, a full disk, or a folder mounted noexec
        return None


def _saved_file(source: Path, compiler: str, options: list[str]) -> Path | None:
    """Return the path for a compiled library; None without a private cache folder or a description of the processor."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = sorted({line for line in lines if line.partition(":")[0].strip() in CPU_FIELDS})
        if not processor:
            return None
        texts = [path.read_text(encoding="utf-8") for path in (source, KERNELS / "vectors.h")]
        program = Path(compiler).resolve()
        version = (str(program), program.stat().st_size, program.stat().st_mtime_ns)
        folder = private_folder(user_cache().absolute() / "microbert" / "kernels")
        return folder / f"{source.stem}-{fingerprint(texts, options, version, processor)}.so"
    except (OSError, RuntimeError):  # the latter if the user has no home
        return None


def _save(library: Path, saved: Path) -> None:
    """Save a library, followed by its SHA-256."""
    with contextlib.suppress(OSError):  # read-only, or a full disk
        content = library.read_bytes()
        write_atomic(saved, lambda file: file.write(content + hashlib.sha256(content).digest()))


def _is_whole(saved: Path) -> bool:
    """Return whether a file is as `_save` wrote it: loading a truncated library would crash the process.

    Raises OSError if it is missing or cannot be read.
    """
    content = saved.read_bytes()
    return hashlib.sha256(content[:-DIGEST_SIZE]).digest() == content[-DIGEST_SIZE:]


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Return the address of a tensor's first number; NULL for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def n_threads() -> ctypes.c_int:
    """Return PyTorch's number of threads, as an argument of a kernel."""
    return ctypes.c_int(torch.get_num_threads())
