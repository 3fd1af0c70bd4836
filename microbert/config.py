"""Constants block -> flags -> one frozen, validated Config; the learning-rate rule.

A script's constants are plain lower-case globals. `read_config` takes them, lets flags of the same names override them, and
checks every value. Nothing heavy is imported here, so that `--help` and a mistake are answered at once.
"""

import argparse
import dataclasses
import difflib
import importlib.util
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

from .dataset_names import FILE_KINDS, InputError, hub_id, named_files
from .dependencies import require_packages
from .output import outlasting_readers

PRETRAINING = 128  # times the learning rate of fine-tuning
RATIO_ROUNDING = 1e-9  # by which a sum of two ratios, such as 0.8 + 0.2, may be above 1
# the highest learning_rate of the sweeps in docs/experiments.md, by the width up to which it holds: v1's; v2's to v4's
HIGHEST_SWEPT = {4: 2e-4, math.inf: 6e-5}
FAR_ABOVE = 2  # times the peak of the highest: there is a warning
MIN_VOCAB_SIZE = 6  # the five special tokens and one that can be learned
DEVICES = r"auto|cpu|mps|cuda(:\d+)?"  # what the constant `device` may be
COMPILER_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # environment variables: where torch.compile saves kernels, and loads them from
# what a preset gives to constants that are None; "auto" leaves those of BY_TIER to the device (memory.py)
PRESETS: dict[str, dict[str, int]] = {
    "auto": {"n_heads": 8, "n_embed": 128, "max_seq_len": 128, "vocab_size": 50_000},
    "large": {"n_layers": 8, "n_heads": 8, "n_embed": 256, "max_seq_len": 256, "vocab_size": 25_000, "batch_size": 96},
}
BY_TIER = ("n_layers", "batch_size")
BY_PRESET = {name for values in PRESETS.values() for name in values}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of a script, checked. Lengths are in tokens, `dataset` and folders are as the user wrote them.

    Those of BY_TIER are None where the preset leaves them to the device, until `fill_in` gives them numbers. `settle_batch_size` makes a
    number of `global_batch_size`, and each process's share of it of `batch_size`.
    """

    n_layers: int | None
    n_heads: int
    n_embed: int
    max_seq_len: int
    vocab_size: int
    dropout: float

    dataset: str
    text_column: str | None
    max_samples: int | None
    streaming: bool
    packing: bool
    lowercase: bool
    strip_accents: bool
    mlm_probability: float

    epochs: int
    batch_size: int | None
    global_batch_size: int | None
    micro_batch_size: int | None
    learning_rate: float
    lr_scaling: str
    optimizer: str
    schedule: str
    warmup_ratio: float
    decay_ratio: float
    weight_decay: float
    grad_clip: float | None

    seed: int
    device: str
    cuda_graphs: bool
    max_minutes: float | None
    group_timeout: int
    eval_every: int | None
    save_every: int | None
    keep_checkpoints: int
    report_to: str | None
    output_dir: str
    cache_dir: str
    overwrite: bool
    prepare_only: bool
    dry_run: bool

    # what v4 adds; a script whose block leaves one out has this value
    arch: str = "bert"
    preset: str | None = None
    memory_budget_gb: float | None = None
    dtype: str = "float32"
    torch_compile: bool | None = False
    gpu_memory_gb: float | None = None
    num_gpus: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_heads", "n_embed", "epochs", "group_timeout", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, "must be at least 1", self)
        for name in BY_TIER:
            _require(getattr(self, name) is None or getattr(self, name) >= 1, name, "must be at least 1", self)
        for name in ("global_batch_size", "micro_batch_size", "max_samples", "eval_every", "save_every", "num_gpus"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, name, "must be None or at least 1", self)
        if self.n_embed % self.n_heads:
            raise InputError(f"n_embed = {self.n_embed} must be divisible by n_heads = {self.n_heads}: each head takes an equal share")
        _require(self.max_seq_len >= 3, "max_seq_len", "must be at least 3: [CLS], one token, [SEP]", self)
        _require(self.vocab_size >= MIN_VOCAB_SIZE, "vocab_size",
                 f"is too small: the special tokens take {MIN_VOCAB_SIZE - 1}, so at least {MIN_VOCAB_SIZE} are needed", self)
        _require(self.learning_rate > 0, "learning_rate", "must be a finite number above 0", self)
        _require(self.lr_scaling in ("auto", "none"), "lr_scaling", 'must be "auto" or "none"', self)
        _require(0 < self.mlm_probability <= 1, "mlm_probability", "must be above 0 and at most 1", self)
        _require(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1", self)
        _require(self.arch in ("bert", "modern"), "arch", 'must be "bert" or "modern"', self)
        if self.arch == "modern" and self.n_embed // self.n_heads % 2:
            raise InputError(f'arch = "modern" turns pairs of numbers: n_embed / n_heads = {self.n_embed} / {self.n_heads} must be even')
        _require(self.optimizer in ("adamw", "muon"), "optimizer", 'must be "adamw" or "muon"', self)
        _require(self.schedule in ("linear", "wsd"), "schedule", 'must be "linear" or "wsd" (warm-up, stable, decay)', self)
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", "must be at least 0 and below 1", self)
        is_used = self.schedule == "wsd"
        _require(self.decay_ratio > 0 and not (is_used and self.warmup_ratio + self.decay_ratio > 1 + RATIO_ROUNDING),
                 "decay_ratio", "must be above 0, and at most 1 with warmup_ratio", self)
        _require(self.weight_decay >= 0, "weight_decay", "must be at least 0", self)
        _require(self.grad_clip is None or self.grad_clip > 0, "grad_clip", "must be None or above 0", self)
        _require(0 <= self.seed < 2**63, "seed", "must be at least 0 and below 2**63", self)
        _require(re.fullmatch(DEVICES, self.device) is not None, "device",
                 'must be "auto", "cpu", "cuda", "cuda:N" or "mps"', self)
        _require(self.dtype in ("auto", "float32", "bfloat16"), "dtype", 'must be "auto", "float32" or "bfloat16"', self)
        for name in ("memory_budget_gb", "gpu_memory_gb", "max_minutes"):
            _require(getattr(self, name) is None or getattr(self, name) > 0, name, "must be None or above 0", self)
        for name in ("gpu_memory_gb", "num_gpus"):
            _require(getattr(self, name) is None or self.dry_run, name, "plans for a machine that is not at hand: it goes with --dry-run", self)
        _require(self.report_to in (None, "tensorboard"), "report_to", 'must be None or "tensorboard"', self)
        if self.report_to and importlib.util.find_spec("tensorboard") is None:
            raise InputError('report_to = "tensorboard" needs a package that is not installed: pip install tensorboard')
        for name in ("dataset", "output_dir", "cache_dir"):
            _require(getattr(self, name).strip() != "", name, "must not be empty", self)
        for name in ("output_dir", "cache_dir"):
            is_utf8 = not any("\ud800" <= character <= "\udfff" for character in getattr(self, name))
            _require(is_utf8, name, "must be valid UTF-8: the libraries that write there open no other names", self)
        if self.dataset not in ("imdb", "hf"):
            if not dataset_files(self) and hub_id(self.dataset) is None:
                raise InputError(f'dataset = "{self.dataset}" is no file that exists: give "imdb", "hf", a Hub id such as '
                                 f'"org/name" or "org/name:config", or paths, folders and globs of {", ".join(FILE_KINDS)} files')


def dataset_files(config: Config) -> list[str]:
    """The files that `dataset` names, none of this suite's own among them. Empty for what is no path. Raises InputError as `named_files` does."""
    return named_files(config.dataset, config.cache_dir, config.output_dir)


def fill_in(config: Config, values: dict[str, int]) -> Config:
    """The Config with these values for the constants of BY_TIER that are None."""
    return dataclasses.replace(config, **{name: values[name] for name in BY_TIER if getattr(config, name) is None})


def settle_batch_size(config: Config, world_size: int, trained: dict | None = None) -> Config:
    """The Config with the number of sequences that all processes take together in a step, and with each one's share of it.

    trained: the constants that a checkpoint was trained with, where there is one. It keeps its global batch on any number of processes.
    Raises InputError where that cannot be shared equally, or other sizes are asked for.
    """
    share, whole = config.batch_size, config.global_batch_size
    if trained is not None:
        kept = trained.get("global_batch_size") or trained["batch_size"]  # the latter in checkpoints from before there was the former
        if whole not in (None, kept):
            raise InputError(f"global_batch_size = {whole} (was {kept}): put it back to go on with this run, or start anew with --overwrite or "
                             "another --output-dir")
        if share not in (trained["batch_size"], kept // world_size):
            raise InputError(f"batch_size = {share} (was {trained['batch_size']}): this run takes {kept} sequences a step, on any number of processes. "
                             "Put it back to go on with it, or start anew with --overwrite or another --output-dir")
        whole = kept
    whole = whole or share * world_size
    if whole % world_size:
        raise InputError(f"global_batch_size = {whole} cannot be shared equally by {world_size} processes: start a number that divides it")
    return dataclasses.replace(config, batch_size=whole // world_size, global_batch_size=whole)


def tokens_per_step(config: Config) -> int:
    """Of all processes together, padding included."""
    return (config.global_batch_size or config.batch_size) * config.max_seq_len


def peak_learning_rate(config: Config) -> float:
    """The peak that the optimizer gets.

    `learning_rate` is read as that with which one fine-tunes a 768-wide BERT. Training from scratch takes PRETRAINING times as much, a narrower model
    more, by the fourth root of the width, and a larger batch more, by the square-root rule (arXiv:2205.10287). Factor and root are fitted to
    sweeps (docs/experiments.md).
    """
    if config.lr_scaling == "none":
        return config.learning_rate
    return config.learning_rate * PRETRAINING * (768 / config.n_embed) ** 0.25 * math.sqrt(tokens_per_step(config) / 4096)


def explain_learning_rate(config: Config) -> str:
    """One line: the constant, the peak, and how the one came from the other. A second one warns of a peak far above
    those that were tried."""
    peak = peak_learning_rate(config)
    if config.lr_scaling == "none":
        line = f"learning rate: {peak:g} as it stands (lr_scaling = none)"
    else:
        line = (
            f"learning rate: {config.learning_rate:g} is what fine-tunes a 768-wide BERT; from scratch, at this width and "
            f"batch, the peak is {config.learning_rate:g} x {PRETRAINING} x (768/{config.n_embed})^(1/4) x "
            f"sqrt({tokens_per_step(config)}/4096) = {peak:.3g}"
        )
    highest = next(highest for width, highest in HIGHEST_SWEPT.items() if config.n_embed <= width)
    swept = peak_learning_rate(dataclasses.replace(config, learning_rate=highest, lr_scaling="auto"))
    if peak > FAR_ABOVE * swept:
        line += (
            f"\nwarning: that is {peak / swept:.0f} times the highest peak that sweeps over v1 to v4 covered at such a width, "
            f"which is {swept:.2g} at this batch (learning_rate = {highest:g} with lr_scaling = auto; docs/experiments.md): "
            "the run may diverge"
        )
    return line


@outlasting_readers()
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
    return Path(named) if os.path.isabs(named) else Path.home() / ".cache"  # the specification says to ignore a relative path


def _fields() -> dict[str, object]:
    return typing.get_type_hints(Config)


def _constants_block(script_name: str, constants: dict[str, object]) -> dict[str, object]:
    block = {name: value for name, value in constants.items()
             if name == name.lower() and not name.startswith("_") and not callable(value) and not isinstance(value, types.ModuleType)}
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
    """Takes `--batch_size` for `--batch-size`, and raises InputError in one line where argparse prints a page and exits."""

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
    parser = Parser(prog=f"python {Path(script).name}", usage="%(prog)s [--constant VALUE ...]", description=first_line, allow_abbrev=False,
                     epilog="Each flag is a constant at the top of the script; editing it there does the same.")
    known = []
    for name, default in defaults.items():
        flag = "--" + name.replace("_", "-")
        flags = [flag, "--lr"] if name == "learning_rate" else [flag]
        known += flags
        text = f"{comments.get(name, '')} [{default}]".strip().replace("%", "%%")
        if bool in (_fields()[name], *typing.get_args(_fields()[name])):
            parser.add_argument(flag, dest=name, nargs="?", const="true", metavar="true|false", default=argparse.SUPPRESS, help=text)
            parser.add_argument("--no-" + flag[2:], dest=name, action="store_const", const="false",
                                default=argparse.SUPPRESS, help=argparse.SUPPRESS)
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


def _require(holds: bool, name: str, rule: str, config: Config) -> None:
    if not holds:
        raise InputError(f"{name} = {getattr(config, name)!r} {rule}")
