"""Configurations of the scripts, as a test or its subprocess needs them."""

import runpy
from pathlib import Path

from helpers import ROOT, SCRIPT

from microbert.config import Config, read_config
from microbert.config.constants import ResolvedConfig, fill_in, resolve_batch_size

V4 = ROOT / "mlm_pretrain_v4.py"


def constants(script: Path = SCRIPT) -> dict[str, object]:
    """Return the block of constants of a script, among its other globals."""
    return {name: value for name, value in runpy.run_path(str(script)).items() if not name.startswith("__")}


def configure(*flags: str, **changed: object) -> Config:
    """Return the Config of v1 with these flags, after these changes of its constants."""
    return read_config(str(SCRIPT), constants() | changed, list(flags))


def configure_v4(*flags: str, **changed: object) -> Config:
    """Return the Config of v4, as `configure` does that of v1."""
    return read_config(str(V4), constants(V4) | changed, list(flags))


def resolve(config: Config, **tier: int) -> ResolvedConfig:
    """Return the Config as one process resolves it. tier: n_layers and batch_size, unless the Config has them."""
    return resolve_batch_size(fill_in(config, tier), 1)
