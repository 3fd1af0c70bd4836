"""torch.compile, with a cache that no other user can write to."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from microbert.config.environment import COMPILER_CACHES, compiler_caches, set_compiler_caches, user_cache
from microbert.runtime.files import private_folder


def compiled(function: Callable, dynamic: bool | None = None) -> Callable:
    """Return `torch.compile(function, dynamic=dynamic)`, and save its kernels where no other user can write.

    Use this instead of torch.compile. By default PyTorch saves kernels in /tmp/torchinductor_<user>, and unpickles and
    loads whatever it finds there: whoever creates that folder first runs code as the user. Precompiled headers are
    turned off, because they stay in that folder whatever TORCHINDUCTOR_CACHE_DIR is.
    """
    _use_private_caches()
    import torch._inductor.config  # here, because the import is slow

    torch._inductor.config.cpp_cache_precompile_headers = False
    return torch.compile(function, dynamic=dynamic)


@functools.cache
def _use_private_caches() -> None:
    set_compiler_caches({name: str(_private_cache(name)) for name in COMPILER_CACHES})


def _private_cache(name: str) -> Path:
    """Return the folder for a variable of COMPILER_CACHES.

    That is the folder that the user set, if it is private; else one in the user's cache; else a temporary one.
    """
    given = compiler_caches().get(name)
    if given is not None and not _is_torchs_own(Path(given)):
        try:
            return private_folder(Path(given).absolute())
        except OSError as error:
            print(f"warning: {name} = {given} is not used for compiled kernels: {error}")
    try:
        return private_folder(user_cache().absolute() / "microbert" / name.split("_")[0].lower())
    except (OSError, RuntimeError) as error:  # RuntimeError if the user has no home
        print(f"warning: compiled kernels are not saved for later runs: {error}")
        return Path(_temporary_cache().name) / name


def _is_torchs_own(folder: Path) -> bool:
    """Return whether PyTorch chose the folder: importing its compiler sets TORCHINDUCTOR_CACHE_DIR."""
    return folder.name.startswith("torchinductor_") and folder.parent == Path(tempfile.gettempdir()).absolute()


@functools.cache
def _temporary_cache() -> tempfile.TemporaryDirectory:
    """Return a folder that is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="microbert-", ignore_cleanup_errors=True)
