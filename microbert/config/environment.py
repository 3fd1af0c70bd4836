"""Environment variables, and folders of the user that they or the system determine."""

import os
import sys
from pathlib import Path

from microbert.config.constants import Config, local_data_files

COMPILER_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # variables: where torch.compile saves its kernels


def compiler_caches() -> dict[str, str]:
    """Return the folders that the environment gives for compiled kernels, by variable."""
    return {name: os.environ[name] for name in COMPILER_CACHES if os.environ.get(name)}


def set_compiler_caches(folders: dict[str, str]) -> None:
    """Set the variables of COMPILER_CACHES, for this process and those it starts."""
    os.environ.update(folders)


def hub_folder(config: Config) -> Path | None:
    """Return the folder of the Hub's downloads (HF_HOME) if the dataset comes from the Hub, else None."""
    if config.dataset == "imdb" or (config.dataset != "hf" and local_data_files(config)):
        return None
    from huggingface_hub.constants import HF_HOME  # here, because the import is slow

    return Path(HF_HOME)


def user_cache() -> Path:
    """Return the folder for the user's caches on this system. Raises RuntimeError if the user has no home."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache_home):  # the specification says to ignore a relative path
        return Path(cache_home)
    return Path.home() / ".cache"
