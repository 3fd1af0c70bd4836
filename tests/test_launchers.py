"""The launchers: the command they start, its values, its folder and its exit code."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest
from helpers import ROOT, TIME_LIMIT, end_tree, wait_for_checkpoint, write_corpus
from launches import finish, flags_of, status

SCRIPTS = ROOT / "scripts"
LAUNCHERS = (
    "train_1gpu.sh",
    "train_24gb.sh",
    "train_h200_8gpu_standard.sh",
    "train_h200_8gpu_v4.sh",
    "train_multinode.sh",
)
HOSTILE = ["a b", ";touch X", "$(touch X)", "`touch X`", "-x", "--", "'", '"', "*", "\\", "a\nb"]


@pytest.fixture
def checkout(tmp_path):
    """Copy what a launcher uses of the repository to a folder with a hostile name."""
    folder = tmp_path / "a b;$(touch X)"
    folder.mkdir()
    for name in ("scripts", "microbert"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("mlm_pretrain_v*.py"):
        shutil.copy(script, folder)
    for link in ROOT.glob("*.sh"):
        (folder / link.name).symlink_to(os.readlink(link))
    return folder


def stub(path, text):
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def call(script, *flags, cwd=None, **variables):
    """Run a launcher with only these of its variables set."""
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return subprocess.run(
        [str(script), *flags],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        cwd=cwd,
        env=environment | {"PYTHON": sys.executable} | variables,
    )


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.fault(row=32)
def test_values_reach_the_script_unchanged(name, checkout, tmp_path):
    reports = stub(tmp_path / "reports", "import json, os, sys\nprint(json.dumps([os.getcwd(), sys.argv[1:]]))")
    done = call(checkout / "scripts" / name, *HOSTILE, PYTHON=str(reports), DATASET="a b;$(touch X)", EPOCHS="-1")
    assert done.returncode == 0, done.stderr
    cwd, arguments = json.loads(done.stdout.splitlines()[-1])
    assert cwd == str(checkout)
    assert arguments[-len(HOSTILE) :] == HOSTILE
    assert "--dataset=a b;$(touch X)" in arguments and "--epochs=-1" in arguments
    assert not list(tmp_path.rglob("X"))


@pytest.mark.fault(row=32)
def test_a_value_may_begin_with_a_dash(checkout):
    done = call(checkout / "scripts" / "train_1gpu.sh", DEVICE="cpu", EPOCHS="-1")
    assert done.returncode == 2 and "epochs = -1 must be at least 1" in done.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_dry_run_prints_the_command_and_does_nothing(name, checkout):
    before = sorted(checkout.rglob("*"))
    done = call(checkout / "scripts" / name, "--output-dir", "a b", DRY_RUN="1", NUM_GPUS="3")
    assert done.returncode == 0
    script = {
        "train_1gpu.sh": "mlm_pretrain_v2.py",
        "train_24gb.sh": "mlm_pretrain_v4.py",
        "train_h200_8gpu_v4.sh": "mlm_pretrain_v4.py",
    }.get(name, "mlm_pretrain_v3.py")
    assert script in done.stdout and "--output-dir a\\ b" in done.stdout and "--dataset=hf" in done.stdout
    assert name in ("train_1gpu.sh", "train_24gb.sh") or (
        "torchrun" in done.stdout and "--nproc-per-node=3" in done.stdout
    )
    assert sorted(checkout.rglob("*")) == before


@pytest.mark.parametrize("code", [0, 1, 2, 75])
@pytest.mark.fault(row=32)
def test_the_exit_code_is_the_runs_and_its_output_is_logged(code, checkout, tmp_path):
    ends = stub(tmp_path / "ends", f"import sys\nprint('to the log')\nsys.stderr.write('this too')\nsys.exit({code})")
    done = call(checkout / "scripts" / "train_1gpu.sh", PYTHON=str(ends))
    assert done.returncode == code
    [log] = (checkout / "logs").iterdir()
    assert "to the log" in log.read_text() and "this too" in log.read_text() and "to the log" in done.stdout


@pytest.mark.parametrize(
    "path, cwd",
    [
        ("train_h200_8gpu_standard.sh", "."),
        ("./train_h200_8gpu_standard.sh", "scripts"),
        ("train_h200_8gpu_v4.sh", "."),
    ],
)
def test_they_work_through_links_and_from_their_own_folder(path, cwd, checkout):
    done = call((checkout / cwd / path) if cwd == "." else path, cwd=checkout / cwd, DRY_RUN="1")
    assert done.returncode == 0 and "mlm_pretrain_v" in done.stdout


def test_the_links_in_the_root_lead_to_the_launchers():
    for name in ("train_h200_8gpu_standard.sh", "train_h200_8gpu_v4.sh"):
        assert (
            (ROOT / name).is_symlink() and (ROOT / name).resolve() == SCRIPTS / name and os.access(ROOT / name, os.X_OK)
        )


@pytest.mark.parametrize("name", ["train_h200_8gpu_v4.sh", "scripts/train_24gb.sh"])
def test_the_large_preset_sets_the_batch_and_auto_leaves_it_to_the_tier(name, checkout):
    large, auto = (call(checkout / name, DRY_RUN="1", **variables).stdout for variables in ({}, {"PRESET": "auto"}))
    assert "--preset=large" in large and "--batch-size=96" in large and "--max-samples=10M" in large
    assert "--preset=auto" in auto and "--batch-size" not in auto


@pytest.mark.parametrize(
    "variables, flags, message",
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, [], "GPUs requested is 8, but PyTorch finds 0"),
        ({"DEVICE": "cpu"}, ["--n-layer", "2"], "did you mean --n-layers?"),
        ({"DEVICE": "cpu", "DATASET": "nothing.txt"}, [], "is not an existing file"),
        ({"DEVICE": "cpu"}, ["--output-dir", "scripts"], "holds other files"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_reported_once_before_any_process_starts(variables, flags, message, checkout):
    done = call(checkout / "train_h200_8gpu_standard.sh", *flags, **variables)
    assert done.returncode == 2
    assert done.stdout.count("error:") == 1 and message in done.stdout and "Traceback" not in done.stdout
    assert not (checkout / "runs").exists()


@pytest.mark.fault(row=32)
def test_shellcheck_finds_nothing():
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, sorted(SCRIPTS.iterdir()))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_run_by_the_launcher_stops_resumes_and_reports_that_it_is_finished(checkout, tmp_path):
    """Exit codes 75, 0 and 0. A signal to the launcher reaches the run."""
    write_corpus(tmp_path / "corpus.jsonl")
    flags = flags_of(tmp_path, 2)
    environment = {**os.environ, "DEVICE": "cpu", "NUM_GPUS": "2", "PYTHON": sys.executable}
    command = [str(checkout / "train_h200_8gpu_standard.sh"), *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        wait_for_checkpoint(process, tmp_path / "run")
        os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: also to the process that writes the log
        code, out, _ = finish(process)
    finally:
        end_tree(process)
    assert code == 75, out
    assert out.count("stopped by SIGTERM") == 1 and "Traceback" not in out
    for message in ("resuming after step", "is finished"):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIME_LIMIT)
        assert done.returncode == 0 and message in done.stdout, done.stdout
    assert status(tmp_path / "run")["exit_code"] == 0
    logs = sorted((checkout / "logs").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(logs) == 3 and "stopped by SIGTERM" in logs[0].read_text()


SRUN = """import os, subprocess, sys
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
tasks = [subprocess.Popen(sys.argv[2:], env={**os.environ, "SLURM_NODEID": str(node)}) for node in nodes]
sys.exit(max(task.wait() for task in tasks))"""
SCONTROL = """import os, sys
if sys.argv[1] == "requeue":
    open("requeued", "w").write(sys.argv[2])
else:
    print("127.0.0.1")"""


@pytest.mark.parametrize(
    "code, state", [(0, "RUNNING"), (1, "RUNNING"), (2, "RUNNING"), (75, "RUNNING"), (75, "COMPLETING")]
)
def test_a_slurm_job_starts_each_node_and_is_requeued_only_after_75(code, state, checkout, tmp_path):
    """srun, scontrol, squeue and Python are replaced. A cancelled job is COMPLETING after it has saved."""
    programs = tmp_path / "programs"
    programs.mkdir()
    stub(programs / "srun", SRUN), stub(programs / "scontrol", SCONTROL), stub(programs / "squeue", f"print({state!r})")
    reports = stub(tmp_path / "reports", f"import sys\nprint(' '.join(sys.argv[1:]))\nsys.exit({code})")
    variables = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_GPUS_ON_NODE": "4",
        "PYTHON": str(reports),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    spooled = shutil.copy(checkout / "scripts" / "train_slurm.sbatch", tmp_path / "slurm_script")  # Slurm runs a copy
    done = call(spooled, "--output-dir", "a b", cwd=checkout, **variables)
    assert done.returncode == code
    commands = [line for line in done.stdout.splitlines() if "microbert.torchrun" in line]
    assert len(commands) == 2 and all(
        "--nnodes=2 --nproc-per-node=4" in line and "--rdzv-endpoint=127.0.0.1:23456" in line for line in commands
    )
    assert sorted("is_host=1" in line for line in commands) == [False, True]
    assert (checkout / "requeued").exists() == (code == 75 and state == "RUNNING")
