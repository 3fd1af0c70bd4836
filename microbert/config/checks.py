"""Checks of constants that pretraining and fine-tuning share."""

import math
import re
import typing
from collections.abc import Iterable

from microbert.errors import InputError

DEVICES = r"auto|cpu|mps|cuda(:\d+)?"  # the constant `device`


def require(is_valid: bool, name: str, rule: str, constants: object) -> None:
    """Raise InputError, with the value of the constant and the rule that it breaks, unless it is valid."""
    if not is_valid:
        raise InputError(f"{name} = {getattr(constants, name)!r} {rule}")


def require_at_least(least: int, names: Iterable[str], constants: object) -> None:
    """Raise InputError unless each of these constants is None or at least this number."""
    for name in names:
        value = getattr(constants, name)
        require(value is None or value >= least, name, f"must be at least {least}", constants)


def check_training_constants(constants: typing.Any) -> None:
    """Raise InputError if max_seq_len, learning_rate, weight_decay, seed or device is out of its range.

    constants: a dataclass with these fields.
    """
    is_long_enough = constants.max_seq_len is None or constants.max_seq_len >= 3
    require(is_long_enough, "max_seq_len", "must be at least 3: [CLS], one token, [SEP]", constants)
    rate = constants.learning_rate  # None in fine-tuning: to be chosen
    require(rate is None or 0 < rate < math.inf, "learning_rate", "must be a finite number above 0", constants)
    require(0 <= constants.weight_decay < math.inf, "weight_decay", "must be at least 0", constants)
    check_seed_and_device(constants)


def check_seed_and_device(constants: typing.Any) -> None:
    """Raise InputError if seed or device is out of its range. constants: an object with these attributes."""
    require(0 <= constants.seed < 2**63, "seed", "must be at least 0 and below 2**63", constants)
    is_device = re.fullmatch(DEVICES, constants.device) is not None
    require(is_device, "device", 'must be "auto", "cpu", "cuda", "cuda:N" or "mps"', constants)
