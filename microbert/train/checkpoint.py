"""Save, verify, load and rotate checkpoints, atomically. All files are safetensors or JSON, so loading runs no code.

checkpoint-<step>/ is a Hugging Face model folder with three more files: optimizer.safetensors, state.json (constants
and state of the run) and manifest.json (size and SHA-256 of every other file, written last).
"""

import contextlib
import dataclasses
import os
import sys
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer

from microbert.config.constants import BY_TIER, Config, ResolvedConfig, fill_in, local_data_files, resolve_batch_size
from microbert.data.local_files import open_files
from microbert.data.tokenizer import VOCABULARY
from microbert.errors import InputError
from microbert.model.export import CONSTANTS_FORMAT, MODEL_FILES, save_model
from microbert.model.hugging_face import from_hugging_face
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.files import read_json, remove, sha256, sync_folder, system_trouble, write_atomic, write_json
from microbert.runtime.run import Run
from microbert.runtime.run_folder import CONSTANTS, checkpoint_folders, holds_model
from microbert.train.hardware import Hardware, hardware_of
from microbert.train.optim import Optimizer

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
FILES = MODEL_FILES | {"optimizer.safetensors", STATE}
ALL_FILES = FILES | {VOCABULARY}  # older checkpoints have no vocabulary
TEMPORARY = ".checkpoint.tmp"
DAMAGE = (OSError, ValueError, KeyError, TypeError)  # raised by reading a damaged file
# constants that do not change the model; a dataset may move, because its tokens are compared
FREE_TO_CHANGE = {
    "dataset",
    "streaming",
    "device",
    "group_timeout",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "report_to",
    "output_dir",
    "cache_dir",
    "overwrite",
    "micro_batch_size",
    "prepare_only",
    "dry_run",
    "preset",
    "memory_budget_gb",
    "dtype",
    "torch_compile",
    "cuda_graphs",
    "gpu_memory_gb",
    "num_gpus",
}
BEFORE_IT_EXISTED = {
    "rows": "packed",
    "embedding_init": "random",
}  # values of constants that the files of older runs lack
BATCH_SIZES = {"batch_size", "global_batch_size"}  # `resolve_batch_size` compares them
RESOLVED = ("batch_size", "global_batch_size", "micro_batch_size")


@dataclasses.dataclass
class State:
    """The state of a run after `step` steps, which took `seconds` over all its starts.

    Losses are in nats per masked token. loss_sum and loss_steps accumulate for the next line of metrics.
    micro_batch_size: what remained of it after memory ran out; None if it did not. prepared_seconds: from the first
    start to the first step.
    """

    tokens_key: str
    step: int = 0
    seconds: float = 0.0
    best_eval_loss: float = float("inf")
    best_step: int = 0
    last_eval_loss: float = float("inf")
    last_eval_accuracy: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    micro_batch_size: int | None = None
    prepared_seconds: float = 0.0


def is_finished(run: Run, device: torch.device) -> bool:
    """Return whether the folder holds the finished run of these constants on this text, and set `run.is_done`.

    Raises InputError if it holds another finished run. Call it before any long work. The first process looks, for all.
    """

    def look() -> bool:
        if holds_model(run.folder):
            compare_with_finished(run.folder, run.given, hardware_of(device, run.world))
            return True
        return False

    run.is_done = run.world.on_rank_0("finished", look, run.check_stop)
    return run.is_done


def compare_with_finished(folder: Path, given: Config, hardware: Hardware) -> tuple[Config, ResolvedConfig]:
    """Return the constants of a finished run as given and resolved, as `look_for_checkpoint` does.

    Raises InputError if the finished run had other constants or another text. Changes nothing. Files are compared by
    content, so they may move. A dataset of the Hub is compared by name, without a request to the Hub.
    """
    stored, corpus_key = _finished_constants(folder)
    filled = fill_in(given, stored)
    different = _differences(stored, filled)
    other_name = _differences(stored, given, ("dataset",))
    if given.dataset in ("imdb", "hf") or not local_data_files(given):
        different += other_name + _differences(stored, given, () if given.dataset == "imdb" else ("streaming",))
    elif different or corpus_key is None:  # the key also depends on constants
        different += other_name
    elif open_files(given).key != corpus_key:
        different = other_name or [f"dataset = {given.dataset!r} (its files held other text then)"]
    if different:
        raise InputError(
            f"{folder} is finished, and was trained with other constants: {', '.join(different)}. "
            "Restore them, or use --overwrite or another --output-dir to train again"
        )
    return filled, resolve_batch_size(filled, hardware.n_processes, stored)


def _finished_constants(folder: Path) -> tuple[dict, str | None]:
    """Return a finished run's constants and the key of its corpus; None if only a checkpoint has the constants."""
    path = folder / CONSTANTS
    try:
        stored = read_json(path)
        if stored["format"] != CONSTANTS_FORMAT or not isinstance(stored["corpus"], str):
            raise ValueError("it is of another version")
        _check_constants(stored["config"])
        return stored["config"], stored["corpus"]
    except DAMAGE as error:
        if path.exists():
            print(f"warning: {path} is damaged ({error}); comparing with a checkpoint instead", file=sys.stderr)
    for checkpoint in checkpoint_folders(folder):
        with contextlib.suppress(*DAMAGE):
            return _read_stored(checkpoint)["config"], None
    raise InputError(
        f"{folder} is finished, but has neither {CONSTANTS} nor a checkpoint, so its constants and text are unknown: "
        "use --overwrite or another --output-dir to train again"
    )


def find_checkpoint(run: Run, device: torch.device) -> Path | None:
    """Return the newest complete checkpoint, or None at the first start. Sets `run.config`.

    Call it before any long work. The first process looks, for all, so only its folder needs the checkpoint. Warns and
    raises as `look_for_checkpoint` does.
    """

    def look() -> dict[str, typing.Any]:
        remove(run.folder / TEMPORARY)  # left by a kill during a save
        path, given, config = look_for_checkpoint(run.folder, run.given, hardware_of(device, run.world))
        return {
            "path": path and str(path),
            "tier": {name: getattr(given, name) for name in BY_TIER},
            "resolved": {name: getattr(config, name) for name in RESOLVED},
        }

    found = run.world.on_rank_0("checkpoint", look, run.check_stop)
    run.given = fill_in(run.given, found["tier"])
    run.config = ResolvedConfig(**dataclasses.asdict(run.given) | found["resolved"])
    return Path(found["path"]) if found["path"] else None


def look_for_checkpoint(folder: Path, given: Config, hardware: Hardware) -> tuple[Path | None, Config, ResolvedConfig]:
    """Return the newest complete checkpoint, and the constants as given and resolved. Changes nothing.

    Constants that a preset leaves to the device come from the checkpoint, so that a run keeps its shape on another
    device, or from the tier of this device. Warns about damaged checkpoints. Raises InputError if all are damaged, if
    the run's constants have changed, or if the processes cannot share the batch.
    """
    folders = checkpoint_folders(folder)
    for path in folders:
        try:
            verify(path)
            stored = _read_stored(path)
            filled = fill_in(given, stored["config"])
            _compare_configs(path, stored["config"], filled)
            resolved = resolve_batch_size(filled, hardware.n_processes, stored["config"])
            if filled.micro_batch_size == stored["config"]["micro_batch_size"]:  # the user does not ask for another
                micro_batch_size = stored["state"].get("micro_batch_size") or filled.micro_batch_size
                resolved = dataclasses.replace(resolved, micro_batch_size=micro_batch_size)
            return path, filled, resolved
        except DAMAGE as error:
            if system_trouble(error):  # the checkpoint may be complete
                raise
            print(f"warning: {path} is damaged ({error}); trying the one before it", file=sys.stderr)
    if folders:
        raise InputError(
            f"no checkpoint in {folder} is complete. --overwrite starts again; until then, nothing is removed"
        )
    filled = fill_in(given, hardware.tier().values())
    return None, filled, resolve_batch_size(filled, hardware.n_processes)


def verify(path: Path) -> None:
    """Check the files of a checkpoint against its manifest. Raises ValueError, KeyError, TypeError or OSError."""
    for name, stored in _complete(path).items():
        if sha256(path / name) != stored["sha256"]:
            raise ValueError(f"{name} is not what was saved")


def _complete(path: Path) -> dict[str, dict]:
    """Return the manifest if all its files exist and have their sizes. Raises as `verify` does."""
    for name in (MANIFEST, *sorted(FILES)):
        _require_file(path / name)
    manifest = read_json(path / MANIFEST)
    if not FILES <= set(manifest) <= ALL_FILES:
        raise ValueError("the manifest does not list the files of a checkpoint")
    for name, stored in manifest.items():
        _require_file(path / name)
        if (path / name).stat().st_size != stored["size"]:
            raise ValueError(f"{name} is not what was saved")
    return manifest


def _require_file(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is missing or a link")


def _is_complete(path: Path) -> bool:
    """Return whether a checkpoint is complete. Raises OSError if it cannot be read: it may be complete then."""
    try:
        return not path.is_symlink() and bool(_complete(path))
    except (ValueError, KeyError, TypeError):
        return False


def save_checkpoint(
    run: Run, state: State, model: MaskedLanguageModel, optimizer: Optimizer, tokenizer: Tokenizer
) -> None:
    """Write checkpoint-<step> unless it exists, and remove all but the newest `keep_checkpoints`.

    Replaces an incomplete checkpoint. Incomplete ones do not count as kept.
    """
    final = run.folder / f"checkpoint-{state.step}"
    if not _is_complete(final):
        temporary = run.folder / TEMPORARY
        remove(temporary)
        temporary.mkdir()
        save_model(model, tokenizer, temporary)
        moments = save(optimizer.tensors())
        write_atomic(temporary / "optimizer.safetensors", lambda file: file.write(moments))
        whole_state = {"format": FORMAT, "config": run.constants(), "state": dataclasses.asdict(state)}
        write_json(temporary / STATE, whole_state)
        write_json(
            temporary / MANIFEST,
            {
                name: {"size": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)}
                for name in sorted(ALL_FILES)
            },
        )
        remove(final)
        os.rename(temporary, final)
        sync_folder(run.folder)
    _remove_old(run.folder, run.config.keep_checkpoints)


def _remove_old(folder: Path, keep_checkpoints: int) -> None:
    folders = checkpoint_folders(folder)
    kept = list(filter(_is_complete, folders))[:keep_checkpoints]
    for old in folders[folders.index(kept[-1]) + 1 :]:
        remove(old)


def remove_others(path: Path, keep_checkpoints: int) -> None:
    """Remove the checkpoints that a run resuming from this one does not need.

    These are damaged newer ones, so that none is ever taken for the newest again, and old ones, if a kill came before
    they were removed.
    """
    folders = checkpoint_folders(path.parent)
    for newer in folders[: folders.index(path)]:
        remove(newer)
    _remove_old(path.parent, keep_checkpoints)


def read_state(path: Path, tokens_key: str | None) -> State:
    """Return the state in a verified checkpoint. Raises InputError if its tokens have another key; None skips that."""
    stored = _read_stored(path)
    state = State(**stored["state"])
    if tokens_key is not None and state.tokens_key != tokens_key:
        raise InputError(
            f"{path} was trained on other tokens, of dataset = {stored['config']['dataset']!r} at that time, or an "
            "earlier version of this suite prepared them. Restore the text, resume with that version, or use "
            "--overwrite or another --output-dir to start again"
        )
    return state


def _read_stored(path: Path) -> dict:
    """Return the content of state.json. Raises ValueError, KeyError, TypeError or OSError if it is damaged."""
    stored = read_json(path / STATE)
    if stored["format"] != FORMAT:
        raise ValueError(f"format {stored['format']}, not {FORMAT}")
    _check_constants(stored["config"])
    for name, value in dataclasses.asdict(State(**stored["state"])).items():
        kind = typing.get_type_hints(State)[name]
        if not isinstance(value, kind | int if kind is float else kind):
            raise ValueError(f"{name} is {value!r}")
    _check_sizes(stored["state"])
    return stored


def _check_constants(constants: object) -> None:
    """Raises ValueError unless the constants that resuming computes with are numbers."""
    if not isinstance(constants, dict):
        raise ValueError("it has no constants")
    sizes = {name: constants.get(name) for name in (*BY_TIER, *BATCH_SIZES, "micro_batch_size")}
    for name, value in sizes.items():
        if not isinstance(value, int if name in BY_TIER else int | None):
            raise ValueError(f"{name} is {value!r}")
    _check_sizes(sizes)


def _check_sizes(values: dict[str, object]) -> None:
    for name, value in values.items():
        if isinstance(value, int | float) and not 0 <= value <= (2**63 if isinstance(value, int) else float("inf")):
            raise ValueError(f"{name} is {value!r}")


def load_checkpoint(path: Path, model: MaskedLanguageModel, optimizer: Optimizer, tokens_key: str) -> State:
    """Load model and optimizer from a verified checkpoint, and return the run's state.

    Raises InputError if it was trained on other tokens, or does not fit the model.
    """
    try:
        state = read_state(path, tokens_key)
        for name in ("model.safetensors", "optimizer.safetensors"):
            with open(path / name, "rb"):  # load_file reports a missing file when too many are open
                pass
        from_hugging_face(model, load_file(path / "model.safetensors"))
        tensors = load_file(path / "optimizer.safetensors")
        if state.step:
            optimizer.begin_after(state.step)
            for name, moment in optimizer.tensors().items():
                moment.copy_(tensors[name])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if system_trouble(error):
            raise
        raise InputError(f"{path} does not fit this run: {error}") from error
    return state


def _compare_configs(path: Path, stored: dict, config: Config) -> None:
    different = _differences(stored, config)
    if different:
        raise InputError(
            f"{path} belongs to a run with other constants: {', '.join(different)}. "
            "Restore them to resume it, or use --overwrite or another --output-dir to start again"
        )


def _differences(stored: dict, config: Config, names: typing.Iterable[str] | None = None) -> list[str]:
    """Return "name = now (was then)" for each of these constants that differs.

    names: None compares all that decide the model.
    """
    now, stored = dataclasses.asdict(config), BEFORE_IT_EXISTED | stored
    if names is None:
        names = [name for name in now if name not in FREE_TO_CHANGE | BATCH_SIZES]
    return [f"{name} = {now[name]!r} (was {stored.get(name)!r})" for name in names if now[name] != stored.get(name)]
