"""Start, watch and end runs of the real scripts on a small corpus."""

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "mlm_pretrain_v1.py"
TIME_LIMIT = 240  # seconds for one run, many times what it takes: only a hang reaches it
LARGEST_FILE = 60_000  # bytes: more than any compiled kernel, less than a training curve
TIMES = {
    "seconds",
    "train/samples_per_second",
    "train/tokens_per_second",
    "train/peak_memory_gb",
}  # what a clock decides
WORDS = [
    "the",
    "a",
    "film",
    "actor",
    "story",
    "was",
    "is",
    "great",
    "bad",
    "slow",
    "and",
    "it",
    "of",
    "scene",
    "music",
    "end",
    "plot",
    "never",
    "always",
    "funny",
]


def write_corpus(path: Path, n_documents: int = 300) -> Path:
    rng = random.Random(7)
    lines = (
        json.dumps({"text": f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60)))})
        for number in range(n_documents)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def corpus_from(finished_run: Path, folder: Path) -> None:
    shutil.copy(finished_run / "corpus.jsonl", folder)


def interrupted_copy(finished_run: Path, folder: Path) -> Path:
    """Copy the finished run and its corpus, in the state of a kill before the end, with two checkpoints."""
    copy = folder / "copy"
    shutil.copytree(finished_run, copy)
    for name in ("README.md", "model.safetensors", "config.json"):
        (copy / "run" / name).unlink()
    return copy


def small_flags(folder: Path, **constants: object) -> list[str]:
    """Return the flags for a run of a few seconds on the corpus in `folder`. Write the corpus if it is missing."""
    corpus = folder / "corpus.jsonl"
    if "dataset" not in constants and not corpus.exists():
        write_corpus(corpus)
    values = {
        "dataset": corpus,
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
        "n_layers": 1,
        "max_seq_len": 32,
        "vocab_size": 300,
        "batch_size": 8,
        "epochs": 2,
        "eval_every": 20,
        "save_every": 10,
        **constants,
    }
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def start(flags: list[str], script: Path = SCRIPT, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(script), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def run_as_user(flags: list[str], script: Path = SCRIPT, **options: object) -> subprocess.CompletedProcess:
    """Start the script as a user does, wait for its end and return its exit code and output."""
    command = [sys.executable, str(script), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, **options)


def run(
    flags: list[str], script: Path = SCRIPT, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run the script to its end and return its exit code and output. Its pictures are empty.

    cwd, env: as for run_python.
    """
    return run_python([str(script), *flags], cwd, env, is_drawing=False)


def run_module(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run `python -m microbert.NAME` to its end and return its exit code and output. cwd: as for run_python."""
    return run_python(["-m", f"microbert.{name}", *arguments], cwd)


def run_python(
    arguments: list[str],
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    limit: float = TIME_LIMIT,
    is_drawing: bool = True,
) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS`, a script or -m and a module, in a forked process and return its exit code and output.

    The process has its libraries loaded, so a run takes half the time. Its output lacks what Python prints at exit.
    cwd, env: the folder and the environment, if not those of the first fork; Python and torch do not see the latter,
    because they are running already. limit: seconds. is_drawing: False leaves pictures empty.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        process = _fork(arguments, out, errors, is_drawing, _enter, cwd, env)
        return subprocess.CompletedProcess(arguments, end_of(process, limit), out.read_text(), errors.read_text())


def _enter(cwd: Path | None, env: dict[str, str] | None) -> None:
    """Change the folder and the environment of this process."""
    if cwd is not None:
        os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]  # it reads the environment when it is loaded; transformers stays as it is


def wait_until(condition: Callable[[], object], process: subprocess.Popen, limit: float = TIME_LIMIT) -> None:
    """Poll until the condition is true. Fail if the process ends first, or after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > deadline:
            end_tree(process)
            raise AssertionError(f"not so after {limit} s: {process.communicate()}")
        time.sleep(0.01)


def wait_for_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    wait_until(lambda: any(folder.glob("checkpoint-*")), process)


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint in the folder, 0 without one."""
    return max((int(path.name[11:]) for path in folder.glob("checkpoint-*")), default=0)


def end_tree(process: subprocess.Popen) -> None:
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            parent.suspend()  # so that it starts no other meanwhile
        for one in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def run_here(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the script in this process, which has its libraries loaded, and return the exit code."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


SLOW_STEPS = """import microbert.train.step
real_step = microbert.train.step.Learner.step
def slow(*arguments, **options):
    time.sleep(0.05)
    return real_step(*arguments, **options)
microbert.train.step.Learner.step = slow"""  # a patch: leaves time to act on a run after its first checkpoint


# forked processes have their libraries loaded: a run takes less time, and a kill at a random time hits the run itself
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "matplotlib.figure",
        "pyarrow.compute",
        "pytest",
        "tokenizers",
        "torch._dynamo",
        "transformers.models.bert.modeling_bert",
        "tests.preloaded",
    ]
)


def fork(
    flags: list[str], log: Path, patch: Callable[..., None] | None = None, *arguments: object
) -> multiprocessing.Process:
    """Start the script in a forked process, after calling patch(*arguments) there, with its output in a file.

    Its pictures are empty.
    """
    return _fork([str(SCRIPT), *flags], log, None, False, patch, *arguments)


def _fork(*arguments: object) -> multiprocessing.Process:
    process = FORKS.Process(target=_run_python, args=arguments)
    process.start()
    return process


def _run_python(
    arguments: list[str],
    log: Path,
    errors: Path | None,
    is_drawing: bool,
    patch: Callable[..., None] | None,
    *of_patch: object,
) -> None:
    """Run `python ARGUMENTS` after patch(*of_patch). errors: the file for stderr, or None to write it to the log."""
    gc.freeze()  # a collection would copy all pages that this process shares with the fork server
    with open(log, "w") as out, open(errors, "w") if errors else contextlib.nullcontext(out) as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
    if not is_drawing:  # the training curve takes most of the time of a short run
        matplotlib.figure.Figure.savefig = lambda figure, file, **options: file.write(b"")
    if patch is not None:
        patch(*of_patch)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def end_of(process: multiprocessing.Process, limit: float = TIME_LIMIT) -> int:
    """Return the exit code, negative after a signal. Kill a process that does not end in time, and fail the test."""
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"no end after {limit} s")
    return process.exitcode


def patched_script(path: Path, patch: str, script: Path = SCRIPT) -> Path:
    """Write a script that runs lines of Python and then another script. Imported, it has the latter's constants."""
    path.write_text(f"""import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
if __name__ == "__main__":
{textwrap.indent(patch, "    ")}
    runpy.run_path({str(script)!r}, run_name="__main__")
else:
    _block = runpy.run_path({str(script)!r})
    globals().update({{name: value for name, value in _block.items() if not name.startswith("__")}})
""")
    return path


def result(folder: Path) -> dict[str, object]:
    """Return what must be bitwise identical after an interruption: hashes of weights and optimizer, and the metrics."""
    checkpoint = folder / f"checkpoint-{newest_step(folder)}"
    files = [folder / "model.safetensors", checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "checkpoint": checkpoint.name,
        "hashes": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        "metrics": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
    }


def listing(folder: Path) -> dict[str, str]:
    """Return the hash of every file in the folder and its subfolders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
