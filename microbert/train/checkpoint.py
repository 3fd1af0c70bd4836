"""Atomic save, verify, resume, rotate: safetensors and JSON alone, so that loading a file never runs what is in it.

checkpoint-<step>/ is a Hugging Face model folder with three files more: optimizer.safetensors, state.json (what the run was
and where it stands) and manifest.json (the size and SHA-256 of every other file, written last).
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

from microbert.config.constants import BY_TIER, Config, fill_in, local_data_files, resolve_batch_size
from microbert.data.local_files import open_files
from microbert.data.tokenizer import VOCABULARY
from microbert.errors import InputError
from microbert.model.export import CONSTANTS_FORMAT, MODEL_FILES, save_model
from microbert.model.hugging_face import from_hugging_face
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.files import read_json, remove, sha256, sync_folder, system_trouble, write_atomic, write_json
from microbert.runtime.run import Run
from microbert.runtime.run_folder import CONSTANTS, checkpoint_folders, holds_model
from microbert.train.memory import Hardware, hardware_of
from microbert.train.optim import Optimizer

FORMAT = 1
MANIFEST = "manifest.json"
FILES = MODEL_FILES | {"optimizer.safetensors", "state.json"}
ALL_FILES = FILES | {VOCABULARY}  # which older checkpoints lack
TEMPORARY = ".checkpoint.tmp"
DAMAGE = (OSError, ValueError, KeyError, TypeError)  # what comes of reading a file that is not as it was written
# constants that say where, how often or on what, not which model comes out; a dataset may move, for its tokens are compared
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
BATCH_SIZES = {"batch_size", "global_batch_size"}  # `resolve_batch_size` compares them


@dataclasses.dataclass
class State:
    """Where a run stands: `step` steps are done, in `seconds` over all its starts.

    Losses are in nats a masked token. loss_sum and loss_steps belong to the line of metrics that is being gathered. micro_batch_size: what is
    left of it where memory has run out, None where it has not. prepared_seconds: from the first start to the first step.
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
    """True when the folder holds the finished run of these constants on this text; then `run.is_done`.

    Raises InputError where it holds another one. Called before any long work; the first process looks, and the others
    get its answer.
    """

    def look() -> bool:
        if holds_model(run.folder):
            compare_with_finished(run.folder, run.given, hardware_of(device, run.world))
            return True
        return False

    run.is_done = run.world.on_rank_0("finished", look, run.check_stop)
    return run.is_done


def compare_with_finished(folder: Path, given: Config, hardware: Hardware) -> tuple[Config, Config]:
    """For a folder whose run has finished, the constants as given and settled, as `look_for_checkpoint` returns them.

    Raises InputError where the finished run had other constants or another text. Changes nothing. Files are compared
    by content: they may move, and a changed one is noticed. A dataset of the Hub is compared by name,
    because the Hub is not asked.
    """
    stored, corpus_key = _finished_constants(folder)
    filled = fill_in(given, stored)
    different = _differences(stored, filled)
    other_name = _differences(stored, given, ("dataset",))
    if given.dataset in ("imdb", "hf") or not local_data_files(given):
        different += other_name + _differences(stored, given, () if given.dataset == "imdb" else ("streaming",))
    elif different or corpus_key is None:  # the key depends on constants too
        different += other_name
    elif open_files(given).key != corpus_key:
        different = other_name or [f"dataset = {given.dataset!r} (its files held other text then)"]
    if different:
        raise InputError(
            f"{folder} is finished, and was trained with other constants: {', '.join(different)}. "
            "Put them back, or train anew with --overwrite or another --output-dir"
        )
    return filled, resolve_batch_size(filled, hardware.n_processes, stored)


def _finished_constants(folder: Path) -> tuple[dict, str | None]:
    """Return a finished run's constants and the key of its corpus, None where only a checkpoint has the constants."""
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
        f"{folder} is finished, and neither {CONSTANTS} nor a checkpoint is left there that says with "
        "which constants and text it was trained: train anew with --overwrite or another --output-dir"
    )


def find_checkpoint(run: Run, device: torch.device) -> Path | None:
    """The newest checkpoint that is whole, or None at the first start; called before any long work.

    Settles run.config by it: the batch, and what a preset leaves to the device. The first process looks, the others are told: only its folder
    needs to hold the checkpoint. Warns and raises as `look_for_checkpoint` does, and InputError for a batch that cannot be shared.
    """

    def look() -> dict[str, object]:
        remove(run.folder / TEMPORARY)  # what a kill inside a save left behind
        path, given, config = look_for_checkpoint(run.folder, run.given, hardware_of(device, run.world))
        return {
            "path": path and str(path),
            "tier": {name: getattr(given, name) for name in BY_TIER},
            "settled": {
                name: getattr(config, name) for name in ("batch_size", "global_batch_size", "micro_batch_size")
            },
        }

    found = run.world.on_rank_0("checkpoint", look, run.check_stop)
    run.given = fill_in(run.given, found["tier"])
    run.config = dataclasses.replace(run.given, **found["settled"])
    return Path(found["path"]) if found["path"] else None


def look_for_checkpoint(folder: Path, given: Config, hardware: Hardware) -> tuple[Path | None, Config, Config]:
    """The newest checkpoint that is whole, and the constants as given and settled. Changes nothing.

    What a preset leaves to the device is filled in from the checkpoint, so that a run keeps its shape on another device, or from this one's tier.
    Warns about each damaged one on the way. Raises InputError when all are damaged, or the run's constants have changed.
    """
    folders = checkpoint_folders(folder)
    for path in folders:
        try:
            verify(path)
            stored = _read_stored(path)
            filled = fill_in(given, stored["config"])
            _compare_configs(path, stored["config"], filled)
            settled = resolve_batch_size(filled, hardware.n_processes, stored["config"])
            if (
                filled.micro_batch_size == stored["config"]["micro_batch_size"]
            ):  # nobody asks for another than the run had
                settled = dataclasses.replace(
                    settled, micro_batch_size=stored["state"].get("micro_batch_size") or filled.micro_batch_size
                )
            return path, filled, settled
        except DAMAGE as error:
            if system_trouble(error):  # it may be whole, and must not be taken for damaged
                raise
            print(f"warning: {path} is damaged ({error}); trying the one before it", file=sys.stderr)
    if folders:
        raise InputError(
            f"no checkpoint in {folder} is whole; --overwrite starts anew, and nothing is removed until then"
        )
    filled = fill_in(given, hardware.tier().values())
    return None, filled, resolve_batch_size(filled, hardware.n_processes)


def verify(path: Path) -> None:
    """Raises ValueError, KeyError, TypeError or OSError unless the checkpoint holds exactly what its manifest says."""
    for name, stored in _complete(path).items():
        if sha256(path / name) != stored["sha256"]:
            raise ValueError(f"{name} is not what was saved")


def _complete(path: Path) -> dict[str, dict]:
    """The manifest, where each file that it lists is there in its size. Raises as `verify` does."""
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
    """Raises OSError where that cannot be read: what may be whole is not to be taken for incomplete."""
    try:
        return not path.is_symlink() and bool(_complete(path))
    except (ValueError, KeyError, TypeError):
        return False


def save_checkpoint(
    run: Run, state: State, model: MaskedLanguageModel, optimizer: Optimizer, tokenizer: Tokenizer
) -> None:
    """Writes checkpoint-<step>, unless it is there already; then removes the oldest beyond keep_checkpoints, and what is older than these.

    What else stands under its name goes; what is no complete checkpoint is not counted among those to keep.
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
        write_json(temporary / "state.json", whole_state)
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
    """What a run that goes on from this checkpoint leaves behind: damaged newer ones, so that none is ever taken for the newest again, and old ones,
    where a kill came before they were removed."""
    folders = checkpoint_folders(path.parent)
    for newer in folders[: folders.index(path)]:
        remove(newer)
    _remove_old(path.parent, keep_checkpoints)


def read_state(path: Path, tokens_key: str | None) -> State:
    """Where the run of a verified checkpoint stands. Raises InputError when it was trained on other tokens than those of the key, if one is given."""
    stored = _read_stored(path)
    state = State(**stored["state"])
    if tokens_key is not None and state.tokens_key != tokens_key:
        raise InputError(
            f"{path} was trained on other tokens, of dataset = {stored['config']['dataset']!r} as it was then: "
            "bring that back, or start anew with --overwrite or another --output-dir"
        )
    return state


def _read_stored(path: Path) -> dict:
    """What state.json holds, as it was saved. Raises ValueError, KeyError, TypeError or OSError where it cannot be."""
    stored = read_json(path / "state.json")
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
    """Raises ValueError unless the numbers that a start computes with are numbers."""
    if not isinstance(constants, dict):
        raise ValueError("no constants are in it")
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
    """Sets model and optimizer as they were saved, and returns the run's state. The checkpoint must have been verified.

    Raises InputError when it was trained on other tokens, or does not fit the model.
    """
    try:
        state = read_state(path, tokens_key)
        for name in ("model.safetensors", "optimizer.safetensors"):
            open(path / name, "rb").close()  # load_file calls a file missing when too many are open
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
            "Put them back to go on with it, or start anew with --overwrite or another --output-dir"
        )


def _differences(stored: dict, config: Config, names: typing.Iterable[str] | None = None) -> list[str]:
    """Return "name = now (was then)" for each of these constants that differs. None: all that decide the model."""
    now = dataclasses.asdict(config)
    if names is None:
        names = [name for name in now if name not in FREE_TO_CHANGE | BATCH_SIZES]
    return [f"{name} = {now[name]!r} (was {stored.get(name)!r})" for name in names if now[name] != stored.get(name)]
