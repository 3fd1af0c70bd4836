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
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .config import COMPILER_CACHES, compiler_caches, set_compiler_caches, user_cache
from .device import find_compiler
from .files import private_folder

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
            subprocess.run(command, check=True, capture_output=True, start_new_session=True)  # so that a signal to stop the run does not stop it
            return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError):  # no OpenMP, say, a full disk, or a folder from which nothing may be run
        return None


def compiled(function: Callable, **options: object) -> Callable:
    """torch.compile, which from now on saves its kernels where no other user can replace them.

    Use this, not torch.compile itself. By default PyTorch saves them in /tmp/torchinductor_<user>, and unpickles and
    loads whatever it finds there: who makes that folder first runs code as the user. Precompiled headers are turned
    off, because they stay in that folder whatever TORCHINDUCTOR_CACHE_DIR says.
    """
    _use_private_caches()
    import torch._inductor.config  # only here, because it takes a while to load

    torch._inductor.config.cpp_cache_precompile_headers = False
    return torch.compile(function, **options)


@functools.cache
def _use_private_caches() -> None:
    set_compiler_caches({name: str(_private_cache(name)) for name in COMPILER_CACHES})


def _private_cache(name: str) -> Path:
    """The folder for a variable of COMPILER_CACHES: the one that the user named, if it is private; else one in the
    user's cache; else a temporary one."""
    given = compiler_caches().get(name)
    if given is not None and not _is_torchs_own(Path(given)):
        try:
            return private_folder(Path(given).absolute())
        except OSError as error:
            print(f"warning: {name} = {given} is not used for compiled kernels: {error}")
    try:
        return private_folder(user_cache().absolute() / "microbert" / name.split("_")[0].lower())
    except (OSError, RuntimeError) as error:  # the latter where the user has no home
        print(f"warning: no compiled kernels are saved for later runs: {error}")
        return Path(_temporary_cache().name) / name


def _is_torchs_own(folder: Path) -> bool:
    """Whether PyTorch itself, and not the user, chose the folder: it sets TORCHINDUCTOR_CACHE_DIR when its compiler
    is imported."""
    return folder.name.startswith("torchinductor_") and folder.parent == Path(tempfile.gettempdir()).absolute()


@functools.cache
def _temporary_cache() -> tempfile.TemporaryDirectory:
    """Lasts as long as this process."""
    return tempfile.TemporaryDirectory(prefix="microbert-", ignore_cleanup_errors=True)


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Of its first number; NULL for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def n_threads() -> ctypes.c_int:
    """Those that PyTorch computes with, as a kernel takes them."""
    return ctypes.c_int(torch.get_num_threads())
