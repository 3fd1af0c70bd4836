"""Disturb real runs by kills, signals, damage and full disks, and compare each with an uninterrupted run.

    python tests/soak.py                                     v1, then v3 with two processes, 30 minutes each
    python tests/soak.py --minutes 5 --seed 3 --scripts v1

A round is a run from an empty folder to its end, with faults at random times. The seed determines the faults, but the
speed of the machine determines when in a run they occur. Exits with 0 if every round ends with bitwise identical
results; otherwise prints what happened and exits with 1.
"""

import argparse
import collections
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil  # noqa: E402
from helpers import ROOT, SCRIPT, end_tree, result, small_flags  # noqa: E402
from launches import flags_of, ranks, torchrun_command  # noqa: E402
from small_disk import SmallDisk, has_small_disks  # noqa: E402

from microbert.runtime.run_folder import checkpoint_folders  # noqa: E402
from microbert.train.checkpoint import DAMAGE, verify  # noqa: E402

N_PROCESSES = {"v1": 1, "v3": 2}
MEGABYTES = 8  # of the disk: five times the size of a run
LONGEST = 300  # seconds for one launch: more is a hang, and fails
KILLED = {0, 1, -signal.SIGKILL}  # 1 if torchrun notices that its processes are gone before it is killed
# the allowed exit codes; -SIGTERM if the signal comes before the process handles it
ENDS = {
    "nothing": {0},
    "kill": KILLED,
    "kill a process": {0, 1},
    "stop": {0, 75, -signal.SIGTERM},
    "fill the disk": {0, 1},
    "damage": KILLED,
}


class Soak:
    """Rounds of one script in `folder`. The run is on the small disk, if there is one."""

    def __init__(self, script: str, seed: int, folder: Path, disk: SmallDisk | None) -> None:
        self.n_processes, self.rng = N_PROCESSES[script], random.Random(f"{seed} {script}")
        self.folder, self.disk = folder, disk
        self.run = (disk.path if disk else folder) / "run"
        self.output_dir = (disk.mount_point if disk else folder) / "run"  # the same folder, as the run sees it
        self.log = folder / "log"
        self.faults = [
            fault
            for fault in ENDS
            if fault != "nothing"
            and (disk or fault != "fill the disk")
            and (self.n_processes > 1 or fault != "kill a process")
        ]
        self.counts: collections.Counter[str] = collections.Counter()
        self.longest = 0.0  # duration of a launch without a fault, in seconds

    def command(self) -> list[str]:
        constants = {
            "output_dir": self.output_dir,
            "epochs": 20,
            "save_every": 15,
            "eval_every": 100,
            "keep_checkpoints": 3,
        }
        if self.n_processes == 1:
            return [sys.executable, str(SCRIPT), *small_flags(self.folder, **constants)]
        return torchrun_command(flags_of(self.folder, self.n_processes, **constants), self.n_processes)

    def start(self) -> subprocess.Popen:
        command = self.disk.command(self.command()) if self.disk else self.command()
        with open(self.log, "w") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=ROOT)

    def end(self, process: subprocess.Popen, fault: str) -> int:
        """Wait for the end, and check that the fault allows the exit code."""
        try:
            code = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            end_tree(process)
            raise SystemExit(f"no end after {LONGEST} s, with {fault}:\n{self.log.read_text()}") from None
        if code not in ENDS[fault] or "Traceback" in self.log.read_text():
            raise SystemExit(f"{fault}: ended with {code}:\n{self.log.read_text()}")
        return code

    def reference(self) -> dict[str, object]:
        begin = time.monotonic()
        self.end(self.start(), "nothing")
        self.longest = time.monotonic() - begin
        whole = result(self.run)
        shutil.rmtree(self.run)
        return whole

    def round(self) -> dict[str, object]:
        """Run to the end through random faults."""
        shutil.rmtree(self.run, ignore_errors=True)
        if self.rng.random() < 0.2:
            shutil.rmtree(self.folder / "cache")
        while True:
            fault = self.rng.choice(self.faults)
            process = self.start()
            try:
                self.wait(process)
                if not self.inflict(fault, process):
                    fault = "nothing"
                code = self.end(process, fault)
            finally:
                end_tree(process)
                if self.disk:
                    self.disk.free()
            self.counts[fault] += 1
            if fault == "damage" and code:
                self.damage()
            if not code:
                return result(self.run)

    def wait(self, process: subprocess.Popen) -> None:
        """Wait for a random number of new checkpoints, which may be 0, then for a random time."""
        wanted = self.newest() + 15 * self.rng.randint(0, 15)
        deadline = time.monotonic() + self.longest
        while process.poll() is None and self.newest() < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.rng.uniform(0, 0.3 * self.longest))

    def newest(self) -> int:
        return (
            int(checkpoint_folders(self.run)[0].name[11:]) if self.run.exists() and checkpoint_folders(self.run) else 0
        )

    def inflict(self, fault: str, process: subprocess.Popen) -> bool:
        """Cause the fault. Return False if the process to disturb has ended."""
        if process.poll() is not None:
            return False
        if fault == "stop":
            process.terminate()
        elif fault == "fill the disk":
            self.disk.fill()
        elif fault == "kill a process":
            found = ranks(process)
            if not found:
                return False
            with contextlib.suppress(psutil.NoSuchProcess):
                self.rng.choice([found[rank] for rank in sorted(found)]).kill()
        else:
            end_tree(process)
        return True

    def damage(self) -> None:
        """Cut a file of the newest checkpoint, fill it with zeros or flip one bit, if an older one can be resumed."""
        whole = (
            [path for path in checkpoint_folders(self.run) if not self.is_damaged(path)] if self.run.exists() else []
        )
        if len(whole) < 2 or (self.run / "README.md").exists():
            return
        file = self.rng.choice(sorted(whole[0].iterdir()))
        data = bytearray(file.read_bytes())
        kind = self.rng.choice(["cut", "zeros", "bit"])
        if kind == "cut":
            del data[self.rng.randrange(len(data)) :]
        elif kind == "zeros":
            data[:] = bytes(len(data))
        else:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        file.write_bytes(data)
        self.counts[f"{file.name}: {kind}"] += 1

    @staticmethod
    def is_damaged(path: Path) -> bool:
        try:
            verify(path)
        except DAMAGE:
            return True
        return False


def soak(script: str, seed: int, minutes: float, folder: Path, disk: SmallDisk | None) -> None:
    """Print the number of rounds and faults. Raises SystemExit with 1 if a round ends with different results."""
    one = Soak(script, seed, folder, disk)
    end = time.monotonic() + 60 * minutes
    reference, rounds = one.reference(), 0
    while not rounds or time.monotonic() < end:
        found = one.round()
        rounds += 1
        if found != reference:
            different = [name for name in reference if found[name] != reference[name]]
            raise SystemExit(
                f"{script}, seed {seed}: round {rounds} ended with different {', '.join(different)}. Its last launch "
                f"printed:\n{one.log.read_text()}"
            )
    faults = ", ".join(f"{name} {count}" for name, count in sorted(one.counts.items()))
    print(
        f"{script}, seed {seed}, {minutes:g} min: {rounds} of {rounds} rounds ended bitwise identical; {faults}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="for each script")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scripts", nargs="+", choices=N_PROCESSES, default=list(N_PROCESSES))
    arguments = parser.parse_args()
    if not has_small_disks():
        print("full disks are not tested here: they require Linux, and root or user namespaces")
    for script in arguments.scripts:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            if has_small_disks():
                with SmallDisk(MEGABYTES) as disk:
                    soak(script, arguments.seed, arguments.minutes, Path(folder), disk)
            else:
                soak(script, arguments.seed, arguments.minutes, Path(folder), None)


if __name__ == "__main__":
    main()
