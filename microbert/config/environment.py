"""Environment variables and folders of the user that the package reads."""

import os
import sys
from pathlib import Path

# environment variables: where torch.compile saves kernels, and loads them from
COMPILER_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def compiler_caches() -> dict[str, str]:
    """The folders that the environment names for compiled kernels, by variable."""
    return {name: os.environ[name] for name in COMPILER_CACHES if os.environ.get(name)}


def set_compiler_caches(folders: dict[str, str]) -> None:
    """Set the variables of COMPILER_CACHES, for this process and those that it starts."""
    os.environ.update(folders)


def user_cache() -> Path:
    """The folder where this system wants a user's caches. Raises RuntimeError where the user has no home."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the specification says to ignore a relative path
        return Path(named)
    return Path.home() / ".cache"
