"""Check that the packages of requirements.txt are installed, without importing them."""

import importlib.util
import sys

from microbert.errors import InputError

# the modules of requirements.txt, except the bundled reviews, which not every run needs
REQUIRED = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "tqdm",
    "filelock",
    "matplotlib",
)


def require_packages() -> None:
    """Raise InputError, with the command that installs them, if packages are missing."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        names = f"the package {missing[0]} is" if len(missing) == 1 else f"the packages {', '.join(missing)} are"
        raise InputError(f"{names} not installed for {sys.executable}: run pip install -r requirements.txt")
