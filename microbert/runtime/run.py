"""A run from its start to its exit code: one folder, one or several processes."""

import contextlib
import dataclasses
import datetime
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import filelock

from microbert.config.constants import Config, ResolvedConfig
from microbert.config.terminal import flush_or_discard, safe_output
from microbert.errors import Failed, InputError, Stopped
from microbert.runtime.distributed import World, lost_process
from microbert.runtime.failures import explain_shortages, known_failure, outcome_of
from microbert.runtime.files import remove_stale, write_json
from microbert.runtime.outcome import BAD_INPUT, DONE, STOPPED, Outcome
from microbert.runtime.run_folder import LOCK, STATUS, holds_model, holds_work, remove_run, take_lock
from microbert.runtime.signals import on_stop_signal
from microbert.runtime.stopping import watch_parent


class Run:
    """The folder of a run, and this process among those that work on it. Rank 0 has the folder's lock, and writes.

    given: the constants as the user gave them; `find_checkpoint` fills in those that a preset leaves to the device.
    config: the resolved constants. `find_checkpoint` sets it; before that, reading it raises AttributeError.
    stop_signal: what asked this process to stop, or None. started: when it was created, by time.perf_counter.
    is_done: whether the folder holds the complete model of this run. Then errors are warnings, and the exit code is 0.
    """

    def __init__(self, config: Config, folder: Path, world: World | None = None) -> None:
        self.given = config
        self.config: ResolvedConfig
        self.folder = folder
        self.world = world or World.alone()
        self.stop_signal: str | None = None
        self.is_done = False
        self.started = time.perf_counter()

    def constants(self) -> dict[str, object]:
        """Return what a later start is compared with: `config`, but batch_size and micro_batch_size as given."""
        as_given = {name: getattr(self.given, name) for name in ("batch_size", "micro_batch_size")}
        return dataclasses.asdict(self.config) | as_given

    def check_stop(self) -> None:
        """Raise Stopped if this or another process received a signal. Call it before training, where nothing is lost.

        Raises Failed when another process has ended, or does not stop with this one.
        """
        try:
            self._check_stop()
        except RuntimeError as error:
            if self.stop_signal and lost_process(error):  # the other process may have stopped as well
                raise Stopped(stopped_by(self.stop_signal)) from error
            raise

    def _check_stop(self) -> None:
        stopping = self.world.stopping
        if stopping.has_a_process_ended():
            raise Failed("another process ended")
        if self.stop_signal:
            if not stopping.ask_to_stop():
                return
        elif stopping.is_asked_to_stop():
            self.stop_signal = "a signal to another process"
        if self.stop_signal:
            if not stopping.wait_for_all_to_stop():
                raise Failed(
                    f"after {self.stop_signal}, another process was killed or did not stop in time. Prepared data is "
                    "saved: run the same command to resume"
                )
            raise Stopped(stopped_by(self.stop_signal))

    def give_up(self) -> None:
        """Raise Stopped if this process received a signal. Call it when other processes do not answer."""
        if self.stop_signal:
            raise Stopped(stopped_by(self.stop_signal))

    def note_stop(self, signal_name: str) -> None:
        """Handle a signal: stop at the next safe point. A finished run ignores it."""
        if self.stop_signal is None and not self.is_done:
            self.stop_signal = signal_name
            if self.world.is_first:
                with contextlib.suppress(RuntimeError):  # the signal interrupted another print to the same stream
                    print(f"\n{signal_name}: stopping at the next safe point ...", file=sys.stderr)

    def write_status(self, outcome: Outcome) -> None:
        """Write status.json."""
        written = {"time": datetime.datetime.now().isoformat(timespec="seconds"), "launch": self.world.launch}
        write_json(self.folder / STATUS, dataclasses.asdict(outcome) | written)


def stopped_by(signal_name: str) -> str:
    """Return the message of a run that a signal stopped."""
    return f"stopped by {signal_name}: run the same command to resume"


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Lock `output_dir` for a run. If the block fails, exit with the codes that README lists.

    Rank 0 takes the lock while the other processes wait. When one process fails, all exit with its code, and
    status.json has its rank and reason. If a single process ends with bad input, the folders created by this call are
    removed, unless they hold a checkpoint or a model. Once `is_done`, the exit code is 0 in any case.
    """
    folder = Path(config.output_dir)
    run = Run(config, folder, World())
    world = run.world
    new_folders = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    lock = filelock.FileLock(folder / LOCK)
    has_folder = False  # whether rank 0 has the lock
    with safe_output(), on_stop_signal(run.note_stop):
        try:
            with explain_shortages(config), _print_on_rank_0_only(world):
                if world.launch:
                    watch_parent(world.parent, lambda: run.note_stop("the end of torchrun"))
                world.meet(run.check_stop, run.give_up)
                world.on_rank_0("folder", lambda: _take_folder(run, lock), run.check_stop)
                has_folder = True
                with _warn_once_done(run):
                    yield run
                with _warn_once_done(run):
                    if world.is_first:
                        run.write_status(Outcome("done", DONE, "", world.rank))
                with _warn_once_done(run):
                    if run.is_done:
                        flush_or_discard()
        except Exception as error:
            outcome = _report_end(error, world)
            if has_folder:
                _leave_folder(run, outcome, lock, new_folders)
            raise SystemExit(outcome.exit_code) from None
        finally:
            lock.release()


def _take_folder(run: Run, lock: filelock.FileLock) -> None:
    take_lock(run.folder, lock)
    remove_stale(run.folder)
    if run.given.overwrite and not run.world.is_restart:  # a restart resumes the run that the first start began
        remove_run(run.folder)
    if not holds_model(run.folder):  # a finished run stays "done" until this start has ended without an error
        run.write_status(Outcome("running", None, "", run.world.rank))


def _report_end(error: Exception, world: World) -> Outcome:
    """Agree with the other processes on the outcome, and print it in one of them."""
    outcome, is_mine = world.stopping.record_end(outcome_of(error, world.rank), final_codes=(BAD_INPUT, STOPPED))
    if world.is_first if outcome.state == "stopped" else is_mine:
        if not isinstance(error, (InputError, Stopped, Failed)) and not known_failure(error):
            traceback.print_exception(error)
        process = f"process {outcome.rank} of {world.size}: " if world.size > 1 else ""
        text = outcome.reason if outcome.state == "stopped" else f"error: {process}{outcome.reason}"
        print(text if outcome.exit_code == BAD_INPUT else f"\n{text}", file=sys.stderr)
    return outcome


def _leave_folder(run: Run, outcome: Outcome, lock: filelock.FileLock, new_folders: list[Path]) -> None:
    """Write status.json; or, after bad input, remove the folders that this run has created and not used."""
    is_bad_input = outcome.exit_code == BAD_INPUT and run.world.size == 1
    if new_folders and is_bad_input and not holds_work(run.folder):
        remove_run(run.folder)
        lock.release()
        (run.folder / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another program has put a file there meanwhile
            for path in new_folders:
                path.rmdir()
    elif not holds_model(run.folder):
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            # each machine may have a folder of its own, which its launcher reads
            run.folder.mkdir(parents=True, exist_ok=True)
            run.write_status(outcome)


@contextlib.contextmanager
def _warn_once_done(run: Run) -> Iterator[None]:
    """Once the run is done, print a warning instead of raising an error."""
    try:
        yield
    except BaseException as error:
        if not run.is_done or isinstance(error, GeneratorExit):
            raise
        with contextlib.suppress(OSError, ValueError):
            print(
                f"warning: the model in {run.folder} is complete, but the run failed after it was written "
                f"({type(error).__name__}: {error})",
                file=sys.stderr,
            )


@contextlib.contextmanager
def _print_on_rank_0_only(world: World) -> Iterator[None]:
    """Discard stdout on other ranks, which print the same as rank 0. Errors go to stderr from any rank."""
    with open(os.devnull, "w", errors="backslashreplace") as nowhere:  # accepts text in any encoding
        quiet = contextlib.nullcontext() if world.is_first else contextlib.redirect_stdout(nowhere)
        with quiet:
            yield
