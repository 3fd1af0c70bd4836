"""torch.compile, with its files where no other user can replace them."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from microbert.config.environment import COMPILER_CACHES, compiler_caches, set_compiler_caches, user_cache
from microbert.runtime.files import private_folder


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
