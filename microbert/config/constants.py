"""The constants of a script as one frozen, validated Config, and the presets."""

import dataclasses
import importlib.util
import re

from microbert.config.dataset_names import FILE_KINDS, find_local_files, hub_id
from microbert.errors import InputError

RATIO_ROUNDING = 1e-9  # by which a sum of two ratios, such as 0.8 + 0.2, may be above 1
MIN_VOCAB_SIZE = 6  # the five special tokens and one that can be learned
DEVICES = r"auto|cpu|mps|cuda(:\d+)?"  # what the constant `device` may be
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

    Those of BY_TIER are None where the preset leaves them to the device, until `fill_in` gives them numbers. `resolve_batch_size` makes a
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
            raise InputError(
                f"n_embed = {self.n_embed} must be divisible by n_heads = {self.n_heads}: each head takes an equal share"
            )
        _require(self.max_seq_len >= 3, "max_seq_len", "must be at least 3: [CLS], one token, [SEP]", self)
        _require(
            self.vocab_size >= MIN_VOCAB_SIZE,
            "vocab_size",
            f"is too small: the special tokens take {MIN_VOCAB_SIZE - 1}, so at least {MIN_VOCAB_SIZE} are needed",
            self,
        )
        _require(self.learning_rate > 0, "learning_rate", "must be a finite number above 0", self)
        _require(self.lr_scaling in ("auto", "none"), "lr_scaling", 'must be "auto" or "none"', self)
        _require(0 < self.mlm_probability <= 1, "mlm_probability", "must be above 0 and at most 1", self)
        _require(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1", self)
        _require(self.arch in ("bert", "modern"), "arch", 'must be "bert" or "modern"', self)
        if self.arch == "modern" and self.n_embed // self.n_heads % 2:
            raise InputError(
                f'arch = "modern" turns pairs of numbers: n_embed / n_heads = {self.n_embed} / {self.n_heads} must be even'
            )
        _require(self.optimizer in ("adamw", "muon"), "optimizer", 'must be "adamw" or "muon"', self)
        _require(
            self.schedule in ("linear", "wsd"), "schedule", 'must be "linear" or "wsd" (warm-up, stable, decay)', self
        )
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", "must be at least 0 and below 1", self)
        is_used = self.schedule == "wsd"
        _require(
            self.decay_ratio > 0 and not (is_used and self.warmup_ratio + self.decay_ratio > 1 + RATIO_ROUNDING),
            "decay_ratio",
            "must be above 0, and at most 1 with warmup_ratio",
            self,
        )
        _require(self.weight_decay >= 0, "weight_decay", "must be at least 0", self)
        _require(self.grad_clip is None or self.grad_clip > 0, "grad_clip", "must be None or above 0", self)
        _require(0 <= self.seed < 2**63, "seed", "must be at least 0 and below 2**63", self)
        _require(
            re.fullmatch(DEVICES, self.device) is not None,
            "device",
            'must be "auto", "cpu", "cuda", "cuda:N" or "mps"',
            self,
        )
        _require(
            self.dtype in ("auto", "float32", "bfloat16"), "dtype", 'must be "auto", "float32" or "bfloat16"', self
        )
        for name in ("memory_budget_gb", "gpu_memory_gb", "max_minutes"):
            _require(getattr(self, name) is None or getattr(self, name) > 0, name, "must be None or above 0", self)
        for name in ("gpu_memory_gb", "num_gpus"):
            _require(
                getattr(self, name) is None or self.dry_run,
                name,
                "plans for a machine that is not at hand: it goes with --dry-run",
                self,
            )
        _require(self.report_to in (None, "tensorboard"), "report_to", 'must be None or "tensorboard"', self)
        if self.report_to and importlib.util.find_spec("tensorboard") is None:
            raise InputError('report_to = "tensorboard" needs a package that is not installed: pip install tensorboard')
        for name in ("dataset", "output_dir", "cache_dir"):
            _require(getattr(self, name).strip() != "", name, "must not be empty", self)
        for name in ("output_dir", "cache_dir"):
            is_utf8 = not any("\ud800" <= character <= "\udfff" for character in getattr(self, name))
            _require(is_utf8, name, "must be valid UTF-8: the libraries that write there open no other names", self)
        if self.dataset not in ("imdb", "hf"):
            if not local_data_files(self) and hub_id(self.dataset) is None:
                raise InputError(
                    f'dataset = "{self.dataset}" is no file that exists: give "imdb", "hf", a Hub id such as '
                    f'"org/name" or "org/name:config", or paths, folders and globs of {", ".join(FILE_KINDS)} files'
                )


def local_data_files(config: Config) -> list[str]:
    """The files that `dataset` names, none of this suite's own among them. Empty for what is no path. Raises InputError as `find_local_files` does."""
    return find_local_files(config.dataset, config.cache_dir, config.output_dir).paths


def fill_in(config: Config, values: dict[str, int]) -> Config:
    """The Config with these values for the constants of BY_TIER that are None."""
    return dataclasses.replace(config, **{name: values[name] for name in BY_TIER if getattr(config, name) is None})


def resolve_batch_size(config: Config, world_size: int, trained: dict | None = None) -> Config:
    """The Config with the number of sequences that all processes take together in a step, and with each one's share of it.

    trained: the constants that a checkpoint was trained with, where there is one. It keeps its global batch on any number of processes.
    Raises InputError where that cannot be shared equally, or other sizes are asked for.
    """
    share, whole = config.batch_size, config.global_batch_size
    if trained is not None:
        kept = (
            trained.get("global_batch_size") or trained["batch_size"]
        )  # the latter in checkpoints from before there was the former
        if whole not in (None, kept):
            raise InputError(
                f"global_batch_size = {whole} (was {kept}): put it back to go on with this run, or start anew with --overwrite or "
                "another --output-dir"
            )
        if share not in (trained["batch_size"], kept // world_size):
            raise InputError(
                f"batch_size = {share} (was {trained['batch_size']}): this run takes {kept} sequences a step, on any number of processes. "
                "Put it back to go on with it, or start anew with --overwrite or another --output-dir"
            )
        whole = kept
    whole = whole or share * world_size
    if whole % world_size:
        raise InputError(
            f"global_batch_size = {whole} cannot be shared equally by {world_size} processes: start a number that divides it"
        )
    return dataclasses.replace(config, batch_size=whole // world_size, global_batch_size=whole)


def tokens_per_step(config: Config) -> int:
    """Of all processes together, padding included."""
    return (config.global_batch_size or config.batch_size) * config.max_seq_len


def _require(holds: bool, name: str, rule: str, config: Config) -> None:
    if not holds:
        raise InputError(f"{name} = {getattr(config, name)!r} {rule}")
