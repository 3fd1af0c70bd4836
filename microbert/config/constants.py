"""The constants of a script as one frozen, validated Config, and the presets."""

import dataclasses
import importlib.util
from collections.abc import Mapping

from microbert.config.checks import check_training_constants, require, require_at_least
from microbert.config.dataset_names import FILE_KINDS, find_local_files, hub_id
from microbert.errors import InputError

RATIO_ROUNDING = 1e-9  # tolerance for a sum of two ratios that should be at most 1, such as 0.8 + 0.2
LONGEST_PIECE = 8_192  # tokens of a row of documents: longer documents are cut in parts first (data/pieces.py)
MIN_VOCAB_SIZE = 6  # five special tokens and one other
# values for constants that are None; "auto" leaves those of BY_TIER to the device (train/hardware.py)
PRESETS: dict[str, dict[str, int]] = {
    "auto": {"n_heads": 8, "n_embed": 128, "max_seq_len": 128, "vocab_size": 50_000},
    "large": {"n_layers": 8, "n_heads": 8, "n_embed": 256, "max_seq_len": 256, "vocab_size": 25_000, "batch_size": 96},
}
ROTARY = {"modern"}  # architectures without position weights
BY_TIER = ("n_layers", "batch_size")
BY_PRESET = {name for values in PRESETS.values() for name in values}
AT_LEAST_1 = (
    *("n_layers", "n_heads", "n_embed", "epochs", "batch_size", "global_batch_size", "micro_batch_size"),
    *("max_samples", "group_timeout", "eval_every", "save_every", "keep_checkpoints", "num_gpus"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The constants of a script as the user gave them, validated. Lengths are in tokens.

    None means that the run decides: the preset's constants of BY_TIER depend on the device, and global_batch_size
    depends on the number of processes. A ResolvedConfig has their values.
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

    # constants of v4; a script without them uses these defaults
    arch: str = "bert"
    rows: str = "packed"
    embedding_init: str = "random"
    preset: str | None = None
    memory_budget_gb: float | None = None
    dtype: str = "float32"
    torch_compile: bool | None = False
    gpu_memory_gb: float | None = None
    num_gpus: int | None = None

    def __post_init__(self) -> None:
        require_at_least(1, AT_LEAST_1, self)
        check_training_constants(self)
        self._check_model()
        self._check_training()
        self._check_machine()
        self._check_paths()

    def _check_model(self) -> None:
        require(self.arch in ("bert", "modern"), "arch", 'must be "bert" or "modern"', self)
        heads = f"{self.n_embed} / {self.n_heads}"
        if self.n_embed % self.n_heads:
            raise InputError(
                f"n_embed = {self.n_embed} must be divisible by n_heads = {self.n_heads}: all heads have the same width"
            )
        if self.arch == "modern" and self.n_embed // self.n_heads % 2:
            raise InputError(f'n_embed / n_heads = {heads} must be even: arch = "modern" rotates pairs of dimensions')
        minimum = f"is too small: the minimum is {MIN_VOCAB_SIZE}, five special tokens and one other"
        require(self.vocab_size >= MIN_VOCAB_SIZE, "vocab_size", minimum, self)
        require(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1", self)
        require(self.rows in ("packed", "documents"), "rows", 'must be "packed" or "documents"', self)
        is_short = self.rows != "documents" or self.max_seq_len <= LONGEST_PIECE
        require(is_short, "max_seq_len", f'must be at most {LONGEST_PIECE:,} with rows = "documents"', self)
        if self.rows == "documents" and not self.packing:
            raise InputError('packing = False has no effect on rows = "documents": set rows = "packed" too')

    def _check_training(self) -> None:
        starts = 'must be "random" or "neighbours"'
        require(self.embedding_init in ("random", "neighbours"), "embedding_init", starts, self)
        require(0 < self.mlm_probability <= 1, "mlm_probability", "must be above 0 and at most 1", self)
        require(self.lr_scaling in ("auto", "none"), "lr_scaling", 'must be "auto" or "none"', self)
        require(self.optimizer in ("adamw", "muon"), "optimizer", 'must be "adamw" or "muon"', self)
        schedules = 'must be "linear" or "wsd" (warm-up, stable, decay)'
        require(self.schedule in ("linear", "wsd"), "schedule", schedules, self)
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", "must be at least 0 and below 1", self)
        is_short = self.schedule != "wsd" or self.warmup_ratio + self.decay_ratio <= 1 + RATIO_ROUNDING
        rule = 'must be above 0, and at most 1 - warmup_ratio with schedule = "wsd"'
        require(self.decay_ratio > 0 and is_short, "decay_ratio", rule, self)
        require(self.grad_clip is None or self.grad_clip > 0, "grad_clip", "must be None or above 0", self)

    def _check_machine(self) -> None:
        dtypes = 'must be "auto", "float32" or "bfloat16"'
        require(self.dtype in ("auto", "float32", "bfloat16"), "dtype", dtypes, self)
        for name in ("memory_budget_gb", "gpu_memory_gb", "max_minutes"):
            require(getattr(self, name) is None or getattr(self, name) > 0, name, "must be None or above 0", self)
        for name in ("gpu_memory_gb", "num_gpus"):
            is_plan = getattr(self, name) is None or self.dry_run
            require(is_plan, name, "describes another machine, so it requires --dry-run", self)
        require(self.report_to in (None, "tensorboard"), "report_to", 'must be None or "tensorboard"', self)
        if self.report_to and importlib.util.find_spec("tensorboard") is None:
            raise InputError('report_to = "tensorboard" requires a missing package: pip install tensorboard')

    def _check_paths(self) -> None:
        for name in ("dataset", "output_dir", "cache_dir"):
            require(getattr(self, name).strip() != "", name, "must not be empty", self)
        for name in ("output_dir", "cache_dir"):
            is_utf8 = not any("\ud800" <= character <= "\udfff" for character in getattr(self, name))
            require(is_utf8, name, "must be valid UTF-8, as the libraries that write files require", self)
        if self.dataset not in ("imdb", "hf") and not local_data_files(self) and hub_id(self.dataset) is None:
            raise InputError(
                f'dataset = "{self.dataset}" is not an existing file: use "imdb", "hf", a Hub id such as "org/name" or '
                f'"org/name:config", or paths, folders and globs of {", ".join(FILE_KINDS)} files'
            )


@dataclasses.dataclass(frozen=True)
class ResolvedConfig(Config):
    """The constants with which a run trains, after the device, the processes and the checkpoint are known.

    batch_size: sequences per step of each process. global_batch_size: of all processes together.
    """

    n_layers: int
    batch_size: int
    global_batch_size: int


def local_data_files(config: Config) -> list[str]:
    """Return the files that `dataset` names, without those of this suite; an empty list if it is not a path.

    Raises InputError as `find_local_files` does.
    """
    return find_local_files(config.dataset, config.cache_dir, config.output_dir).paths


def fill_in(config: Config, values: Mapping[str, int]) -> Config:
    """Return the Config with these values for the constants of BY_TIER that are None."""
    return dataclasses.replace(
        config,
        n_layers=config.n_layers or values["n_layers"],
        batch_size=config.batch_size or values["batch_size"],
    )


def resolve_batch_size(config: Config, world_size: int, trained: Mapping[str, int] | None = None) -> ResolvedConfig:
    """Return the config with the batch size of all processes together and of each one.

    config: after `fill_in`. trained: the constants of the run's checkpoint, if there is one. A run keeps its global
    batch on any number of processes. Raises InputError if the processes cannot share it equally, or if the user asks
    for another one.
    """
    n_layers, share, whole = config.n_layers, config.batch_size, config.global_batch_size
    if n_layers is None or share is None:
        raise ValueError("call fill_in first")
    if trained is not None:
        # checkpoints of early versions have no global_batch_size
        kept = trained.get("global_batch_size") or trained["batch_size"]
        advice = "Restore it to resume this run, or use --overwrite or another --output-dir to start again"
        if whole not in (None, kept):
            raise InputError(f"global_batch_size = {whole} (was {kept}). {advice}")
        if share not in (trained["batch_size"], kept // world_size):
            raise InputError(
                f"batch_size = {share} (was {trained['batch_size']}). This run trains on {kept} sequences per step, "
                f"on any number of processes. {advice}"
            )
        whole = kept
    whole = whole or share * world_size
    if whole % world_size:
        raise InputError(
            f"global_batch_size = {whole} cannot be shared equally by {world_size} processes: "
            "start a number that divides it"
        )
    constants = dataclasses.asdict(config)
    constants |= {"n_layers": n_layers, "batch_size": whole // world_size, "global_batch_size": whole}
    return ResolvedConfig(**constants)


def tokens_per_step(config: ResolvedConfig) -> int:
    """Return the tokens of a step of all processes together, padding included."""
    return config.global_batch_size * config.max_seq_len
