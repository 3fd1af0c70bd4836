"""The folder of a run: its files, its lock, and what may be removed from it."""

import contextlib
import re
from pathlib import Path

import filelock

from microbert.errors import InputError
from microbert.runtime.files import read_json, remove

STATUS, LOCK = "status.json", ".lock"
METRICS, TRAINING_CURVE = "metrics.jsonl", "training_curve.png"
LOSS_TABLE, LOSS_PICTURE = "loss_by_length.json", "loss_by_length.png"
TENSORBOARD = "tensorboard"  # a folder
CONSTANTS = "constants.json"  # the constants of a finished run, and the text it was trained on
HELD_OUT = "held_out.json"  # which documents were never trained on: those whose hash of (seed, text) is below a number
FINISHED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
RUN_FILES = (
    *FINISHED_FILES,
    *("vocab.txt", CONSTANTS, HELD_OUT, METRICS, TRAINING_CURVE, LOSS_TABLE, LOSS_PICTURE, STATUS),
)


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first. Symbolic links do not count."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if re.fullmatch(r"[0-9]{1,18}", path.name[11:]) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def holds_model(folder: Path) -> bool:
    """Return whether the folder holds a finished run: the model card is written last."""
    return all((folder / name).is_file() for name in FINISHED_FILES)


def holds_work(folder: Path) -> bool:
    """Return whether the folder holds a checkpoint, complete or not, or a part of an exported model."""
    return bool(checkpoint_folders(folder)) or any((folder / name).exists() for name in FINISHED_FILES)


def check_folder(folder: Path) -> None:
    """Raise InputError where the folder is not one that a run may write to."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir = {str(folder)!r} is a file, not a folder")
    if folder.exists() and not _is_run(folder) and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(
            f"output_dir = {str(folder)!r} holds other files. Choose a new folder, so that none of them is replaced"
        )


def _is_run(folder: Path) -> bool:
    return (folder / STATUS).exists() or (folder / METRICS).exists() or bool(checkpoint_folders(folder))


def take_lock(folder: Path, lock: filelock.FileLock) -> None:
    """Create the folder if it is missing, and acquire its lock.

    Raises InputError where it cannot be written to, or another run has the lock.
    """
    holder = "another process"
    try:
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        with contextlib.suppress(OSError, ValueError, KeyError):
            status = read_json(folder / STATUS)
            if status["state"] == "running":  # otherwise an earlier process has written it
                holder = f"process {status['pid']} on {status['host']}, since {status['time']}"
        raise InputError(
            f"output_dir = {str(folder)!r} is in use by {holder}. Wait for it to end, or choose another --output-dir"
        ) from None
    except OSError as error:
        raise InputError(f"output_dir = {str(folder)!r} cannot be written: {error.strerror}") from None


def remove_run(folder: Path) -> None:
    """Remove the files of a run by name, and nothing else."""
    for path in (*checkpoint_folders(folder), folder / TENSORBOARD):
        remove(path)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
