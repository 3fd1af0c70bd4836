"""A small disk (a tmpfs) that is seen by the processes of one namespace alone, and goes with them: full, or read-only, as a person's may be."""

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
    """Whether this user may have some: it takes Linux with namespaces, and root or namespaces for users."""
    if not all(map(shutil.which, ("unshare", "nsenter", "mount"))):
        return False
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode == 0


class SmallDisk:
    """Mounted while the context lasts, at `mount_point` for processes that are started through `command`.

    `path` is the same folder for everybody else, as long as the disk is there.
    """

    def __init__(self, megabytes: float) -> None:
        self.mount_point = Path(tempfile.mkdtemp(prefix="small-disk-"))
        options = f"size={int(megabytes * 2**20)}"
        hold = f"mount -t tmpfs -o {options} none {self.mount_point} && echo mounted && exec cat"  # until its input is closed
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
        """The command as it has to be started to see the disk."""
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
    """Takes what is free on the file's disk."""
    with open(file, "ab", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(bytes(2**16)):
            pass
