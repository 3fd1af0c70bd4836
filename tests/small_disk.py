"""A small disk (a tmpfs) that can be full or read-only, and exists only in the namespace of its processes."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from helpers import ROOT

UNSHARE = (
    ["unshare", "--mount"]
    if hasattr(os, "geteuid") and os.geteuid() == 0
    else ["unshare", "--user", "--map-root-user", "--mount"]
)
BALLAST = "ballast"


def has_small_disks() -> bool:
    """Return whether this user can mount small disks: on Linux, as root or with user namespaces."""
    if not all(map(shutil.which, ("unshare", "nsenter", "mount"))):
        return False
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode == 0


class SmallDisk:
    """A disk that is mounted within the context, at `mount_point` for processes that are started by `command`.

    `path` is the same folder for all other processes.
    """

    def __init__(self, megabytes: float) -> None:
        self.mount_point = Path(tempfile.mkdtemp(prefix="small-disk-"))
        options = f"size={int(megabytes * 2**20)}"
        # cat keeps the namespace alive until its input is closed
        hold = f"mount -t tmpfs -o {options} none {self.mount_point} && echo mounted && exec cat"
        self._holder = subprocess.Popen(
            [*UNSHARE, "sh", "-c", hold],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Self:
        if self._holder.stdout.readline() != "mounted\n":
            self.__exit__(None, None, None)
            raise OSError("the disk could not be mounted")
        self.path = Path(f"/proc/{self._holder.pid}/root{self.mount_point}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.communicate()
        self.mount_point.rmdir()

    def command(self, command: list[str]) -> list[str]:
        """Return the command that starts `command` where it sees the disk."""
        return [
            "nsenter",
            f"--target={self._holder.pid}",
            *(["--user", "--preserve-credentials"] if "--user" in UNSHARE else []),
            "--mount",
            f"--wd={ROOT}",
            *command,
        ]

    def make_read_only(self) -> None:
        subprocess.run(self.command(["mount", "-o", "remount,ro", str(self.mount_point)]), check=True)

    def fill(self) -> None:
        fill(self.path / BALLAST)

    def free(self) -> None:
        (self.path / BALLAST).unlink(missing_ok=True)


def fill(file: Path) -> None:
    """Fill the disk of the file."""
    with open(file, "ab", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(bytes(2**16)):
            pass
