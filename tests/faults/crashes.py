"""How tests watch a run, and kill, stop or disturb it at a certain point."""

import builtins
import os
import shutil
import signal
import time
from pathlib import Path

from helpers import fork, listing

import microbert.kernels.compile
import microbert.runtime.files
import microbert.train.checkpoint
import microbert.train.loop
import microbert.train.step


def files_of(folder):
    """Return what `listing` returns of a run, without status.json, which is about the launch and not the run."""
    return {name: value for name, value in listing(folder / "run").items() if name != "status.json"}


def beginning_of(flags, log):
    """Start a run, and return its process and the seconds until its first checkpoint."""
    process = fork(flags, log)
    begin = time.monotonic()
    folder = Path(flags[flags.index("--output-dir") + 1])
    while process.is_alive() and not any(folder.glob("checkpoint-*")):
        time.sleep(0.005)
    return process, time.monotonic() - begin


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def without_kernels():
    """Run without the C kernels, which take longer to compile than they save in a run of seconds."""
    microbert.kernels.compile.find_compiler = lambda: None


class Points:
    """The points of the second save that change the disk. At each, the run's folder is copied."""

    def __init__(self, copies):
        self.copies, self.folder, self.count = copies, None, 0  # the folder of the run during the second save

    def reach(self, name):
        if self.folder is not None:
            self.count += 1
            shutil.copytree(self.folder, self.copies / f"{self.count:02} {name}")

    def before(self, name, real):
        """Return the function with a point before it."""

        def call(*arguments, **options):
            self.reach(name)
            return real(*arguments, **options)

        return call


class HalfWritten:
    """A file with a point in the middle of every write."""

    def __init__(self, file, points):
        self.file, self.points = file, points

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.points.reach("half a write")
        self.file.write(data[len(data) // 2 :])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def copy_during_second_save(copies):
    """During the second save, copy the folder of the run as a kill would leave it.

    That is within each write, and before each other change. copies: the folder of the copies, which are named by the
    number and the kind of the point.
    """
    without_kernels()
    real_save, points = microbert.train.checkpoint.save_checkpoint, Points(copies)

    def save(*arguments):
        folder = arguments[0].folder
        points.folder = folder if list(folder.glob("checkpoint-*")) else None
        real_save(*arguments)
        points.folder = None

    def open_half_written(path, mode="r", **options):
        file = real_open(path, mode, **options)
        return HalfWritten(file, points) if mode == "wb" else file

    real_open = builtins.open
    microbert.train.loop.save_checkpoint = save
    microbert.runtime.files.open = open_half_written
    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, points.before(name, getattr(os, name)))


def die_in_micro_batch(number):
    """Kill the process at this micro-batch of the run."""
    real, calls = microbert.train.step.masked_loss, 0

    def loss(*arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            kill()
        return real(*arguments)

    microbert.train.step.masked_loss = loss


def stop_in_second_save():
    """Send SIGTERM to the process during the second save."""
    real_save, real_fsync = microbert.train.checkpoint.save_checkpoint, os.fsync
    saves = 0

    def save(*arguments):
        nonlocal saves
        saves += 1
        real_save(*arguments)

    def fsync(descriptor):
        if saves == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real_fsync(descriptor)

    microbert.train.loop.save_checkpoint, os.fsync = save, fsync


def plant_incomplete_folders_and_die():
    """Create incomplete checkpoints before each save after the first, and kill the process after the fourth save.

    They are newer than the saved one, older, and in its place.
    """
    real_save, saves = microbert.train.checkpoint.save_checkpoint, 0

    def save(run, state, *arguments):
        nonlocal saves
        saves += 1
        names = (f"checkpoint-{state.step}", "checkpoint-9999", f"checkpoint-{state.step - 1}", ".checkpoint.tmp")
        for name in names if saves > 1 else ():
            (run.folder / name).mkdir(exist_ok=True)
            (run.folder / name / "config.json").write_text("{}")
        real_save(run, state, *arguments)
        if saves == 4:
            kill()

    microbert.train.loop.save_checkpoint = save


def damage(path, kind):
    """Damage a file. kind: "truncated", "zeroed" or "bit-flipped"."""
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        del data[len(data) // 2 :]
    elif kind == "zeroed":
        data[:] = bytes(len(data))
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
