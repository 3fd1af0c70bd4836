"""Read a script's constants and its command line into one validated Config.

A script's constants are plain lower-case globals. Flags of the same names override them. This module imports nothing
heavy, so `--help` and configuration errors answer at once.
"""

import argparse
import ast
import dataclasses
import difflib
import io
import itertools
import math
import os
import re
import runpy
import sys
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from microbert.config.constants import BY_PRESET, PRESETS, Config
from microbert.config.requirements import require_packages
from microbert.config.terminal import safe_output
from microbert.errors import InputError

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
METAVARS = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
FLAG_COLUMNS = 32  # width of the column of flags in --help
NO_BREAK = "\u00a0"  # a space at which textwrap breaks no line
EPILOG = (
    "Each flag is a constant at the top of the script; editing it there has the same effect. A true-or-false flag "
    "also works as --flag and --no-flag. --lr is short for --learning-rate."
)


@safe_output()
def read_config(script: str, constants: Mapping[str, object], argv: Sequence[str] | None = None) -> Config:
    """Return the Config of a script: its constants, overridden by flags.

    script: the script's path (`__file__`). The comments of its constants become the text of `--help`.
    constants: the script's `globals()`.
    argv: the flags; None uses sys.argv[1:].
    On any mistake, prints one line to stderr and exits with code 2.
    """
    try:
        values = _constants_block(Path(script).name, constants)
        values |= _read_flags(script, values, argv)
        config = Config(**_with_preset(values))
        require_packages()
        return config
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun, one process reports for all
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def read_script(script: Path, argv: Sequence[str]) -> Config:
    """Return the Config of a script with these flags, without running it. Exits as `read_config` does."""
    constants = {name: value for name, value in runpy.run_path(str(script)).items() if not name.startswith("__")}
    return read_config(str(script), constants, argv)


def _constant_types() -> dict[str, object]:
    """Return the types of the constants in a script's block, where those that a preset sets may be None."""
    hints = typing.get_type_hints(Config)
    return hints | {name: hints[name] | None for name in BY_PRESET}


def _constants_block(script_name: str, constants: Mapping[str, object]) -> dict[str, typing.Any]:
    hints = _constant_types()
    block = {
        name: value
        for name, value in constants.items()
        if name == name.lower()
        and not name.startswith("_")
        and not callable(value)
        and not isinstance(value, types.ModuleType)
    }
    for name in block:
        if name not in hints:
            raise InputError(f"{script_name}: unknown constant {name}{_suggestion(name, hints)}")
    for field in dataclasses.fields(Config):
        if field.name not in block and field.default is dataclasses.MISSING:
            raise InputError(f"{script_name}: the constant {field.name} is missing from the block at the top")
    return {name: convert(name, value, hints[name]) for name, value in block.items()}


def _with_preset(values: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Replace None by the preset's values. Raises InputError for a None that no preset replaces."""
    preset = values.get("preset")
    if preset is not None and preset not in PRESETS:
        raise InputError(f'preset = {preset!r} must be "auto" or "large"')
    of_preset = {} if preset is None else PRESETS[preset]
    filled = values | {name: value for name, value in of_preset.items() if values[name] is None}
    for name in sorted(BY_PRESET):
        if filled[name] is None and preset is None:
            raise InputError(f"{name} must not be None{' without a preset' if 'preset' in values else ''}")
    return filled


def _read_flags(script: str, defaults: Mapping[str, object], argv: Sequence[str] | None) -> dict[str, object]:
    source = Path(script).read_text(encoding="utf-8-sig")  # Windows editors may add a byte-order mark
    parser = Parser(
        prog=f"python {Path(script).name}",
        usage="%(prog)s [--flag VALUE ...]",
        description=(ast.get_docstring(ast.parse(source)) or "").partition("\n")[0],
        allow_abbrev=False,
        epilog=EPILOG,
    )
    hints = _constant_types()
    parser.add_constants({name: hints[name] for name in defaults}, defaults, comments_of_constants(source))
    return parser.parse_constants(argv, elsewhere=hints)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts `--batch_size` for `--batch-size`, and raises InputError on a mistake."""

    def __init__(self, **options: typing.Any) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter} | options)
        self._hints: dict[str, object] = {}  # the constants that have flags, and their types

    def add_constants(
        self, hints: Mapping[str, object], defaults: Mapping[str, object], comments: Mapping[str, str]
    ) -> None:
        """Add a flag for each constant. hints: type by name. comments: help text by name."""
        self._hints |= hints
        for name, hint in hints.items():
            flag = _flag(name)
            options: dict[str, typing.Any] = {"dest": name, "default": argparse.SUPPRESS}
            shown = options | {
                "metavar": METAVARS[_base_type(hint)],
                "help": f"{comments.get(name, '')} [default:{NO_BREAK}{defaults[name]}]".strip().replace("%", "%%"),
            }
            hidden = options | {"help": argparse.SUPPRESS}
            if _base_type(hint) is bool:
                self.add_argument(flag, **shown, nargs="?", const="true")
                self.add_argument("--no-" + flag[2:], **hidden, action="store_const", const="false")
            elif name == "dataset":  # the shell expands a glob to several values
                self.add_argument(flag, **shown, nargs="+")
            else:
                self.add_argument(flag, **shown)
            if name == "learning_rate":
                self.add_argument("--lr", **hidden)

    def parse_constants(
        self, argv: Sequence[str] | None = None, elsewhere: Iterable[str] = ()
    ) -> dict[str, typing.Any]:
        """Return the values of the flags that were given, converted to their types, and of other arguments.

        elsewhere: constants of other scripts, which the error for an unknown flag recognises.
        Raises InputError on any mistake.
        """
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            hint = ""
            if flag.startswith("-") and flag.removeprefix("--").replace("-", "_") in elsewhere:
                hint = ": this constant belongs to another version, and this script's block does not have it"
            elif flag.startswith("-"):
                hint = _suggestion(flag, [*map(_flag, self._hints), "--lr"])
            kind = "flag" if flag.startswith("-") else "argument"
            raise InputError(f"unknown {kind} {unknown[0]}{hint} (--help lists every flag)")
        values = vars(parsed)
        if isinstance(values.get("dataset"), list):
            values["dataset"] = ",".join(values["dataset"])
        return {
            name: convert(name, value, self._hints[name]) if name in self._hints else value
            for name, value in values.items()
        }

    def parse_known_args(self, args: typing.Any = None, namespace: typing.Any = None) -> tuple:
        arguments = list(map(_with_dashes, sys.argv[1:] if args is None else args))
        if any(not action.option_strings for action in self._actions):
            # argparse would take the positional argument after a bare boolean flag as the flag's value
            booleans = {_flag(name) for name, hint in self._hints.items() if _base_type(hint) is bool}
            arguments = [
                f"{argument}=true" if argument in booleans and following.lower() not in BOOLEANS else argument
                for argument, following in itertools.pairwise([*arguments, ""])
            ]
        return super().parse_known_args(arguments, namespace)

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} (--help lists every flag)")


class _HelpFormatter(argparse.HelpFormatter):
    """Place long flags beside their text, and never break a line inside "[default: X]"."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=FLAG_COLUMNS)

    def format_help(self) -> str:
        return super().format_help().replace(NO_BREAK, " ")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_dashes(argument: str) -> str:
    """Replace underscores by dashes in the name of a flag, but not in its value or in another argument."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[A-Za-z][\w-]*", name) else argument


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _base_type(hint: typing.Any) -> type:
    """Return `int` for `int` and for `int | None`."""
    return (typing.get_args(hint) or (hint,))[0]


def convert(name: str, value: typing.Any, hint: object) -> typing.Any:
    """Convert the value of a constant, or the text of a flag, to the constant's type.

    hint: bool, int, float or str, or one of them `| None`. Where None is allowed, the text "none" means None.
    Raises InputError for any other value.
    """
    may_be_none = types.NoneType in typing.get_args(hint)
    if value is None or (isinstance(value, str) and value.lower() == "none" and may_be_none):
        if may_be_none:
            return None
        raise InputError(f"{name} must not be None")
    return CONVERTERS[_base_type(hint)](name, value)


def _boolean(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in BOOLEANS:
        return BOOLEANS[value.lower()]
    raise InputError(f"{name} = {value!r} must be true or false")


def _text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    raise InputError(f"{name} = {value!r} must be text in quotes")


def whole_number(name: str, value: object) -> int:
    """Return the integer that 32, "32", "500K", "10m" or 1e6 stands for. Raises InputError for any other value."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?(?:e\d+)?)([km]?)", str(value).replace("_", "").lower().strip())
    if match:
        number = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2]]
        if number.is_integer():  # False for infinity
            return int(number)
    raise InputError(f"{name} = {value!r} must be a whole number, such as 5000, 500K or 10M")


def _finite_number(name: str, value: typing.Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name} = {value!r} must be a finite number")
    return number


CONVERTERS: dict[type, Callable[[str, typing.Any], object]] = {
    bool: _boolean,
    str: _text,
    int: whole_number,
    float: _finite_number,
}


def comments_of_constants(source: str, class_name: str | None = None) -> dict[str, str]:
    """Return the comment of each `name = value` statement, by name.

    class_name: reads the fields of this class instead of the module's constants.
    A comment counts if it is on a line of the statement, which may span several lines.
    """
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body
    if class_name is not None:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == class_name)
    found = {}
    for node in body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found
