"""One run, one folder: the lock on output_dir, status.json, signals, exit codes."""

import contextlib
import dataclasses
import datetime
import errno
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import filelock

from microbert.config.constants import Config, ResolvedConfig, dataset_files
from microbert.config.terminal import flush_or_discard, safe_output
from microbert.errors import Failed, InputError, Stopped
from microbert.runtime.device import out_of_memory
from microbert.runtime.distributed import World, lost_process
from microbert.runtime.files import DISK_FULL, read_json, remove, remove_stale, system_trouble, write_json

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")  # the last when a terminal closes; Windows has none
STATUS, LOCK = "status.json", ".lock"
TENSORBOARD = "tensorboard"  # the folder of its files
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
CONSTANTS = "constants.json"  # of a finished run, and which text it was trained on
SHORTAGES = DISK_FULL | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
HELD_OUT = (
    "held_out.json"  # which documents the run has never trained on: those whose hash of (seed, text) is below a number
)
RUN_FILES = (*MODEL_FILES, "vocab.txt", CONSTANTS, HELD_OUT, "metrics.jsonl", "training_curve.png", STATUS)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """For modules that people start: end with one line, and 2 for what the user can fix, 1 for other known failures."""
    with safe_output():
        try:
            yield
        except (InputError, Failed, OSError, MemoryError) as error:
            trouble = system_trouble(error)
            if not trouble and isinstance(error, OSError):
                raise
            print(f"error: {trouble or error}", file=sys.stderr)
            raise SystemExit(BAD_INPUT if isinstance(error, InputError) else FAILED) from None


class Run:
    """The folder of a run, and this process among those that work on it. The first of them holds the folder's lock, and writes.

    given: the constants as the user gave them; `find_checkpoint` fills in those that a preset leaves to the device.
    config: the resolved constants. `find_checkpoint` sets it; before that, reading it raises AttributeError.
    stop_signal: what told this process to stop, if anything did. started: the time then, by time.perf_counter.
    is_done: the folder holds the whole model of this run. From then on an error is a warning, and the exit code is 0.
    """

    def __init__(self, config: Config, folder: Path, world: World | None = None) -> None:
        self.given = config
        self.config: ResolvedConfig
        self.folder = folder
        self.world = world or World({})
        self.stop_signal: str | None = None
        self.is_done = False
        self.started = time.perf_counter()

    def constants(self) -> dict[str, object]:
        """What a later start is compared with: the resolved constants, but batch_size and micro_batch_size as given."""
        as_given = {name: getattr(self.given, name) for name in ("batch_size", "micro_batch_size")}
        return dataclasses.asdict(self.config) | as_given

    def check_stop(self) -> None:
        """Raises Stopped when a signal has arrived, at this process or another: to be called before training, where nothing would be lost.

        Raises Failed when another process has ended, or cannot stop with this one.
        """
        try:
            self._check_stop()
        except RuntimeError as error:
            if self.stop_signal and lost_process(error):  # it may have stopped, too
                raise Stopped(stopped_by(self.stop_signal)) from error
            raise

    def _check_stop(self) -> None:
        if self.world.has_ended():
            raise Failed("another process ended")
        if self.stop_signal:
            if not self.world.ask_to_stop():
                return
        elif self.world.is_to_stop():
            self.stop_signal = "a signal to another process"
        if self.stop_signal:
            if not self.world.wait_for_all_to_stop():
                raise Failed(
                    f"told to stop by {self.stop_signal}, and another process was killed or did not stop in time. What is prepared stays: the same command "
                    "goes on"
                )
            raise Stopped(stopped_by(self.stop_signal))

    def give_up(self) -> None:
        """Raise Stopped where this process was told to stop: to be called before training, where other processes do
        not answer."""
        if self.stop_signal:
            raise Stopped(stopped_by(self.stop_signal))

    def write_status(self, story: dict[str, object]) -> None:
        """story: as `_story` gives it."""
        write_json(
            self.folder / STATUS,
            story | {"time": datetime.datetime.now().isoformat(timespec="seconds"), "launch": self.world.launch},
        )


def stopped_by(signal_name: str) -> str:
    return f"stopped by {signal_name}; the same command goes on from here"


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Holds `output_dir` for one run, and ends the process with the README's exit codes when something goes wrong inside.

    Of several processes the first one holds it, and the others wait for that; when one of them fails, all end with its
    code, and status.json has its rank and reason. Where a process is alone and its input is bad, folders that this call
    made are removed again, unless they hold a checkpoint or a model. Once `is_done`, the run ends with 0 in any case.
    """
    with safe_output(), _hold(config) as run:
        yield run


@contextlib.contextmanager
def _hold(config: Config) -> Iterator[Run]:
    """As open_run, which lends it output that outlasts its readers: how the run has ended is printed here too."""
    folder = Path(config.output_dir)
    run = Run(config, folder, World())
    world = run.world
    world.give_up = run.give_up
    new_folders = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    lock = filelock.FileLock(folder / LOCK)
    signals = {
        name: signal.signal(getattr(signal, name), lambda *_, name=name: _note_stop(run, name))
        for name in handled_signals()
    }
    owns_folder = False  # this process, or the first one for it
    try:
        with _shortage_told(config), _quiet_but_first(world):
            world.watch_parent(lambda: _note_stop(run, "the end of torchrun"))
            world.meet(run.check_stop)
            world.on_rank_0("folder", lambda: _take_folder(run, lock), run.check_stop)
            owns_folder = True
            with _harmless_once_done(run):
                yield run
            with _harmless_once_done(run):
                if world.is_first:
                    run.write_status(_story("done", DONE, "", world.rank))
            with _harmless_once_done(run):
                if run.is_done:
                    flush_or_discard()
    except Exception as error:
        story, is_mine = world.first_end(_story_of(error, world), for_good=(BAD_INPUT, STOPPED))
        if world.is_first if story["state"] == "stopped" else is_mine:
            if not isinstance(error, (InputError, Stopped, Failed)) and not _known_failure(error):
                traceback.print_exception(error)
            _print_outcome(story, world)
        is_bad_input = story["exit_code"] == BAD_INPUT and world.size == 1
        if owns_folder and new_folders and is_bad_input and not _holds_work(folder):
            _remove_earlier_run(folder)
            lock.release()
            (folder / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                for path in new_folders:
                    path.rmdir()
        elif owns_folder and not holds_model(folder):
            with contextlib.suppress(OSError):  # a full disk must not hide the error itself
                folder.mkdir(
                    parents=True, exist_ok=True
                )  # on another machine it may be another folder, and that machine's launcher looks there
                run.write_status(story)
        raise SystemExit(story["exit_code"]) from None
    finally:
        lock.release()
        for name, handler in signals.items():
            signal.signal(getattr(signal, name), handler)


def _take_folder(run: Run, lock: filelock.FileLock) -> None:
    take_lock(run.folder, lock)
    remove_stale(run.folder)
    if run.given.overwrite and not run.world.is_restart:  # started again after a failure, the run goes on
        _remove_earlier_run(run.folder)
    if not holds_model(run.folder):  # of a finished run, status.json keeps its "done" until this start has ended well
        run.write_status(_story("running", None, "", run.world.rank))


@contextlib.contextmanager
def _harmless_once_done(run: Run) -> Iterator[None]:
    """Make a warning of whatever is raised after the run is done."""
    try:
        yield
    except BaseException as error:
        if not run.is_done or isinstance(error, GeneratorExit):
            raise
        with contextlib.suppress(OSError, ValueError):
            print(
                f"warning: the model in {run.folder} is complete; what came after it failed "
                f"({type(error).__name__}: {error})",
                file=sys.stderr,
            )


def _story(state: str, exit_code: int | None, reason: str, rank: int) -> dict[str, object]:
    """What status.json tells, by the process of this rank."""
    return {
        "state": state,
        "exit_code": exit_code,
        "reason": reason,
        "rank": rank,
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }


def _story_of(error: Exception, world: World) -> dict[str, object]:
    if isinstance(error, InputError):
        return _story("failed", BAD_INPUT, str(error), world.rank)
    if isinstance(error, Stopped):
        return _story("stopped", STOPPED, str(error), world.rank)
    if isinstance(error, Failed):
        return _story("failed", FAILED, str(error), world.rank if error.rank is None else error.rank)
    return _story("failed", FAILED, _known_failure(error) or f"{type(error).__name__}: {error}", world.rank)


def _known_failure(error: Exception) -> str:
    """What a person needs to hear of it, "" where only the error itself tells."""
    if shortage := out_of_memory(error):
        return f"out of memory ({shortage}). Where nothing else holds it, a smaller micro_batch_size, vocab_size, n_embed or n_layers takes less"
    return lost_process(error) or system_trouble(error)


def _print_outcome(story: dict[str, object], world: World) -> None:
    if story["state"] == "stopped":
        print(f"\n{story['reason']}", file=sys.stderr)
    else:
        where = f"process {story['rank']} of {world.size}: " if world.size > 1 else ""
        print(f"{'' if story['exit_code'] == BAD_INPUT else chr(10)}error: {where}{story['reason']}", file=sys.stderr)


@contextlib.contextmanager
def _quiet_but_first(world: World) -> Iterator[None]:
    """Each process has the same to tell of the run: the first one tells it. What goes wrong is told by stderr, and by whom it befalls."""
    with open(os.devnull, "w", errors="backslashreplace") as nothing:  # in any encoding
        with contextlib.nullcontext() if world.is_first else contextlib.redirect_stdout(nothing):
            yield


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first. Symbolic links are not followed, and not counted."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if re.fullmatch(r"[0-9]{1,18}", path.name[11:]) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def holds_model(folder: Path) -> bool:
    """True where a run has finished: the model card is the last file that it writes."""
    return all((folder / name).is_file() for name in MODEL_FILES)


def _holds_work(folder: Path) -> bool:
    """True where the folder holds a checkpoint, whole or not, or a part of the exported model."""
    return bool(checkpoint_folders(folder)) or any((folder / name).exists() for name in MODEL_FILES)


def check_folder(folder: Path) -> None:
    """Raises InputError where the folder is none that a run may write to."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir = {str(folder)!r} is a file, not a folder")
    if folder.exists() and not _is_run(folder) and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(
            f"output_dir = {str(folder)!r} holds other files; choose a new folder, so that nothing of yours is replaced"
        )


def hub_folder(config: Config) -> Path | None:
    """HF_HOME, where the dataset is one that comes from the Hub."""
    if config.dataset == "imdb" or (config.dataset != "hf" and dataset_files(config)):
        return None
    from huggingface_hub.constants import HF_HOME  # only here, because it takes a while to load

    return Path(HF_HOME)


def shortage_behind(error: BaseException) -> OSError | None:
    """Return the error itself or one that it came from, where the disk, the memory or the open files ran out.

    Libraries raise errors of their own for it, some of them with `from None`.
    """
    waiting, seen = [error], set()
    while waiting:
        error = waiting.pop()
        if isinstance(error, OSError) and error.errno in SHORTAGES:
            return error
        seen.add(id(error))
        waiting += [
            before for before in (error.__context__, error.__cause__) if before is not None and id(before) not in seen
        ]
    return None


@contextlib.contextmanager
def _shortage_told(config: Config) -> Iterator[None]:
    """Raise Failed, with what to look at, for any error that came from a shortage."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        full = shortage_behind(error)
        if full is None:
            raise
        if full.errno not in DISK_FULL:
            raise Failed(f"{system_trouble(full)}. What is saved stays: the same command resumes") from error
        places = [full.filename] if full.filename else [config.output_dir, config.cache_dir, hub_folder(config)]
        why = "a file is larger than ulimit -f allows" if full.errno == errno.EFBIG else "the disk is full"
        raise Failed(
            f"{why} ({' or '.join(str(place) for place in places if place)}). What is saved stays: free some space, and the same command "
            "goes on"
        ) from error


def handled_signals() -> list[str]:
    """Those of STOP_SIGNALS that this process can handle and does not ignore, as nohup lets it ignore SIGHUP.

    Python handles none in another than the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [
        name
        for name in STOP_SIGNALS
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN
    ]


def _note_stop(run: Run, name: str) -> None:
    if run.stop_signal is None and not run.is_done:
        run.stop_signal = name
        if run.world.is_first:
            with contextlib.suppress(
                RuntimeError
            ):  # the signal has come in the middle of another print, which waits for its reader
                print(f"\n{name}: stopping at the next safe point ...", file=sys.stderr)


def take_lock(folder: Path, lock: filelock.FileLock) -> None:
    """Makes the folder where it is not there, and holds it. Raises InputError where it is no folder to write to, or another run holds it."""
    holder = "another process"
    try:
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        with contextlib.suppress(OSError, ValueError, KeyError):
            status = read_json(folder / STATUS)
            if status["state"] == "running":  # otherwise it was written by an earlier process
                holder = f"process {status['pid']} on {status['host']}, since {status['time']}"
        raise InputError(
            f"output_dir = {str(folder)!r} is in use by {holder}; wait for it, or choose another --output-dir"
        ) from None
    except OSError as error:
        raise InputError(f"output_dir = {str(folder)!r} cannot be written: {error.strerror}") from None


def _is_run(folder: Path) -> bool:
    return (folder / STATUS).exists() or (folder / "metrics.jsonl").exists() or bool(checkpoint_folders(folder))


def _remove_earlier_run(folder: Path) -> None:
    """Removes what a run leaves, by name, and nothing else."""
    for path in (*checkpoint_folders(folder), folder / TENSORBOARD):
        remove(path)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
