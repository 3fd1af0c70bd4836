"""A script's constants block and its command line -> one checked Config.

A script's constants are plain lower-case globals. `read_config` reads them, lets flags of the same names override them, and
checks every value. Nothing heavy is imported here, so that `--help` and a mistake are answered at once.
"""

import argparse
import dataclasses
import difflib
import io
import math
import os
import re
import runpy
import sys
import tokenize
import types
import typing
from pathlib import Path

from microbert.config.constants import BY_PRESET, PRESETS, Config
from microbert.config.requirements import require_packages
from microbert.config.terminal import safe_output
from microbert.errors import InputError


@safe_output()
def read_config(script: str, constants: dict[str, object], argv: list[str] | None = None) -> Config:
    """The Config of a script: its constants, overridden by flags. Prints one line and exits with 2 on any mistake.

    script: the script's path (`__file__`); the comments of its block become the text of `--help`.
    constants: the script's `globals()`.
    argv: the flags, sys.argv[1:] when None.
    """
    try:
        values = _constants_block(Path(script).name, constants)
        values |= _parse_flags(script, values, argv)
        config = Config(**_with_preset(values))
        require_packages()
        return config
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # each of torchrun's processes has the same to say
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def read_script(script: Path, argv: list[str]) -> Config:
    """The Config that a script has with these flags, without running it. Ends as `read_config` does on any mistake."""
    constants = {name: value for name, value in runpy.run_path(str(script)).items() if not name.startswith("__")}
    return read_config(str(script), constants, argv)


def _fields() -> dict[str, object]:
    return typing.get_type_hints(Config)


def _constants_block(script_name: str, constants: dict[str, object]) -> dict[str, object]:
    block = {
        name: value
        for name, value in constants.items()
        if name == name.lower()
        and not name.startswith("_")
        and not callable(value)
        and not isinstance(value, types.ModuleType)
    }
    for name in block:
        if name not in _fields():
            raise InputError(f"{script_name}: unknown constant {name}{_suggestion(name, _fields())}")
    for field in dataclasses.fields(Config):
        if field.name not in block and field.default is dataclasses.MISSING:
            raise InputError(f"{script_name}: the constant {field.name} is missing from the block at the top")
    return {name: _convert(name, value) for name, value in block.items()}


def _with_preset(values: dict[str, object]) -> dict[str, object]:
    """The values with the preset's in place of None. Raises InputError where None is left and there is no preset."""
    preset = values.get("preset")
    if preset is not None and preset not in PRESETS:
        raise InputError(f'preset = {preset!r} must be "auto" or "large"')
    filled = values | {name: value for name, value in PRESETS.get(preset, {}).items() if values[name] is None}
    for name in sorted(BY_PRESET):
        if filled[name] is None and preset is None:
            raise InputError(f"{name} must not be None" + " without a preset" * ("preset" in values))
    return filled


class Parser(argparse.ArgumentParser):
    """Accepts `--batch_size` for `--batch-size`, and raises InputError where argparse prints a page and exits."""

    def parse_known_args(self, args: list[str] | None = None, namespace: object = None) -> tuple:
        return super().parse_known_args(list(map(_with_dashes, sys.argv[1:] if args is None else args)), namespace)

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} (--help lists every flag)")


def _with_dashes(argument: str) -> str:
    """A flag with dashes in its name, whatever its value; any other argument as it is."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[A-Za-z][\w-]*", name) else argument


def _parse_flags(script: str, defaults: dict[str, object], argv: list[str] | None) -> dict[str, object]:
    source = Path(script).read_text(encoding="utf-8")
    first_line, comments = _docstring_line(source), _comments(source)
    parser = Parser(
        prog=f"python {Path(script).name}",
        usage="%(prog)s [--constant VALUE ...]",
        description=first_line,
        allow_abbrev=False,
        epilog="Each flag is a constant at the top of the script; editing it there does the same.",
    )
    known = []
    for name, default in defaults.items():
        flag = "--" + name.replace("_", "-")
        flags = [flag, "--lr"] if name == "learning_rate" else [flag]
        known += flags
        text = f"{comments.get(name, '')} [{default}]".strip().replace("%", "%%")
        if bool in (_fields()[name], *typing.get_args(_fields()[name])):
            parser.add_argument(
                flag, dest=name, nargs="?", const="true", metavar="true|false", default=argparse.SUPPRESS, help=text
            )
            parser.add_argument(
                "--no-" + flag[2:],
                dest=name,
                action="store_const",
                const="false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        elif name == "dataset":  # a glob that the shell has spelt out comes as many values
            parser.add_argument(flag, dest=name, nargs="+", metavar="VALUE", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(*flags, dest=name, metavar="VALUE", default=argparse.SUPPRESS, help=text)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        hint = _suggestion(flag, known) if flag.startswith("-") else ""
        if flag.removeprefix("--").replace("-", "_") in _fields():
            hint = ": it is a constant of another version, which this one's block does not have"
        raise InputError(f"unknown flag {unknown[0]}{hint} (--help lists every flag)")
    values = vars(parsed)
    if "dataset" in values:
        values["dataset"] = ",".join(values["dataset"])
    return {name: _convert(name, value) for name, value in values.items()}


def _suggestion(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _convert(name: str, value: object) -> object:
    """A constant or a flag's text as the field's type. `None` and `none` mean None where the field may be None."""
    hint = _fields()[name]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    may_be_none = types.NoneType in options or name in BY_PRESET
    if value is None or (isinstance(value, str) and value.lower() == "none" and may_be_none):
        if may_be_none:
            return None
        raise InputError(f"{name} must not be None")
    kind = options[0]
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise InputError(f"{name} = {value!r} must be true or false")
    if isinstance(value, bool):
        raise InputError(f"{name} = {value} must be a {'number' if kind in (int, float) else 'text'}")
    if kind is str:
        if not isinstance(value, str):
            raise InputError(f"{name} = {value!r} must be a text in quotes")
        return value
    if kind is int:
        return whole_number(name, value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name} = {value!r} must be a finite number")
    return number


def whole_number(name: str, value: object) -> int:
    """32, "32", "500K", "10m", 1e6."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?(?:e\d+)?)([km]?)", str(value).replace("_", "").lower().strip())
    if match:
        number = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2]]
        if number.is_integer():  # which infinity is not
            return int(number)
    raise InputError(f"{name} = {value!r} must be a whole number (500K and 10M are understood)")


def _docstring_line(source: str) -> str:
    match = re.match(r'\s*"""(.*)', source)
    return match[1].strip('" ') if match else ""


def _comments(source: str) -> dict[str, str]:
    """The comment behind each `name = value` line of a script."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = re.match(r"([a-z_]+) = ", token.line)
        if token.type == tokenize.COMMENT and match:
            comments[match[1]] = token.string.lstrip("# ")
    return comments
