"""MicroBERT: pretrain a small BERT from scratch, on your own machine."""

import sys

from .dataset_names import InputError
from .dependencies import require_packages

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # as `python -m microbert.NAME` has it while the package loads: NAME imports what may be missing
    try:
        require_packages()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
