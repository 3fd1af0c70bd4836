"""One run, one folder: the lock on output_dir, status.json, signals, exit codes."""

import contextlib
import datetime
import errno
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import filelock

from .config import Config, InputError, dataset_files
from .files import read_json, remove_stale, write_json

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
STATUS, LOCK = "status.json", ".lock"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the last where `ulimit -f` says how large a file may be; Python ignores its signal
RUN_FILES = (*MODEL_FILES, "metrics.jsonl", "training_curve.png", STATUS)


class Stopped(Exception):
    """A signal asked the run to stop, and everything is saved."""


class Failed(Exception):
    """The run cannot go on, for a reason that lies outside its input; the message says which, and what to try."""


class Diverged(Failed):
    """The numbers broke down (NaN or infinity)."""


class Run:
    """The folder of a run that this process holds the lock of. `stop_signal` is the signal that arrived, if one did."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.stop_signal: str | None = None

    def is_finished(self) -> bool:
        """True when the folder holds a whole run: the model card is the last file that a run writes."""
        return all((self.folder / name).is_file() for name in MODEL_FILES)

    def check_stop(self) -> None:
        """Raises Stopped when a signal has arrived: to be called where nothing would be lost."""
        if self.stop_signal:
            raise Stopped(f"stopped by {self.stop_signal}; the same command goes on from here")

    def write_status(self, state: str, exit_code: int | None, reason: str) -> None:
        write_json(self.folder / STATUS, {"state": state, "exit_code": exit_code, "reason": reason, "rank": 0, "pid": os.getpid(),
                                          "host": socket.gethostname(), "time": datetime.datetime.now().isoformat(timespec="seconds")})


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Holds `output_dir` for one run, and ends the process with the README's exit codes when something goes wrong inside.

    Folders that this call made are removed again when the input turns out to be bad.
    """
    folder = Path(config.output_dir)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    run = Run(config, folder)
    lock = filelock.FileLock(folder / LOCK)
    holds_lock = False
    signals = {name: signal.signal(getattr(signal, name), lambda *_, name=name: _note_signal(run, name)) for name in ("SIGTERM", "SIGINT")}
    try:
        with _full_disk_told(config):
            _acquire(folder, lock)
            holds_lock = True
            remove_stale(folder)
            if config.overwrite:
                _remove_earlier_run(folder)
            run.write_status("running", None, "")
            yield run
            run.write_status("done", DONE, "")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        if holds_lock and new_folders:
            _remove_earlier_run(folder)
            lock.release()
            (folder / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                for path in new_folders:
                    path.rmdir()
        elif holds_lock:
            run.write_status("failed", BAD_INPUT, str(error))
        raise SystemExit(BAD_INPUT) from None
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        run.write_status("stopped", STOPPED, str(stopped))
        raise SystemExit(STOPPED) from None
    except Failed as error:
        print(f"\nerror: {error}", file=sys.stderr)
        if holds_lock:
            with contextlib.suppress(OSError):  # a full disk must not hide the error itself
                run.write_status("failed", FAILED, str(error))
        raise SystemExit(FAILED) from None
    except Exception as error:
        traceback.print_exc()
        if holds_lock:
            with contextlib.suppress(OSError):
                run.write_status("failed", FAILED, f"{type(error).__name__}: {error}")
        raise SystemExit(FAILED) from None
    finally:
        lock.release()
        for name, handler in signals.items():
            signal.signal(getattr(signal, name), handler)


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first. Symbolic links are not followed, and not counted."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def check_folder(folder: Path) -> None:
    """Raises InputError where the folder is none that a run may write to."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir = {str(folder)!r} is a file, not a folder")
    if folder.exists() and not _is_run(folder) and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"output_dir = {str(folder)!r} holds other files; choose a new folder, so that nothing of yours is replaced")


def hub_folder(config: Config) -> Path | None:
    """HF_HOME, where the dataset is one that comes from the Hub."""
    if config.dataset == "imdb" or (config.dataset != "hf" and dataset_files(config)):
        return None
    from huggingface_hub.constants import HF_HOME  # only here, because it takes a while to load

    return Path(HF_HOME)


def full_disk_behind(error: BaseException) -> OSError | None:
    """The error itself or one that it came from. Libraries raise their own for it, and some put `from None` behind them."""
    waiting, seen = [error], set()
    while waiting:
        error = waiting.pop()
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return error
        seen.add(id(error))
        waiting += [before for before in (error.__context__, error.__cause__) if before is not None and id(before) not in seen]
    return None


@contextlib.contextmanager
def _full_disk_told(config: Config) -> Iterator[None]:
    """Raises Failed, with the places to look at, for any error behind which a full disk stands."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        full = full_disk_behind(error)
        if full is None:
            raise
        places = [full.filename] if full.filename else [config.output_dir, config.cache_dir, hub_folder(config)]
        why = "a file is larger than ulimit -f allows" if full.errno == errno.EFBIG else "the disk is full"
        raise Failed(f"{why} ({' or '.join(str(place) for place in places if place)}). What is saved stays: free some space, and the same command "
                     "goes on") from error


def _note_signal(run: Run, name: str) -> None:
    if run.stop_signal is None:
        run.stop_signal = name
        print(f"\n{name}: stopping at the next safe point ...", file=sys.stderr)


def _acquire(folder: Path, lock: filelock.FileLock) -> None:
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        try:
            status = read_json(folder / STATUS)
            holder = f"process {status['pid']} on {status['host']}, since {status['time']}"
        except (OSError, ValueError, KeyError):
            holder = "another process"
        raise InputError(f"output_dir = {str(folder)!r} is in use by {holder}; wait for it, or choose another --output-dir") from None
    except OSError as error:
        raise InputError(f"output_dir = {str(folder)!r} cannot be written: {error.strerror}") from None


def _is_run(folder: Path) -> bool:
    return (folder / STATUS).exists() or (folder / "metrics.jsonl").exists() or bool(checkpoint_folders(folder))


def _remove_earlier_run(folder: Path) -> None:
    """Removes what a run leaves, by name, and nothing else."""
    for path in checkpoint_folders(folder):
        shutil.rmtree(path)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
