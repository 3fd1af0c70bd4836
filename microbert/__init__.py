"""MicroBERT: pretrain a small BERT from scratch, on your own machine."""

import sys

from microbert.config.requirements import require_packages
from microbert.errors import InputError

__version__ = "0.1.0"

# argv while `python -m microbert.NAME` loads the package: NAME imports packages that may be missing
if sys.argv[:1] == ["-m"]:
    try:
        require_packages()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
