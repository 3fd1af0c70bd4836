"""Put the repository on the import path, so that benchmarks run without an installation.

Every benchmark imports this module before the package. ruff keeps that order: it sorts this module as third-party.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def new_parser(docstring: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose description is the first line of a benchmark's docstring."""
    return argparse.ArgumentParser(description=docstring.splitlines()[0], epilog=epilog)
