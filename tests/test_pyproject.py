"""The package's metadata: what `pip install -e .` and `uv sync` install is what the requirements files list."""

import email
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

import microbert

DYNAMIC = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["dynamic"]
GROUPS = {"bench", "tensorboard", "dev"}


def files_of(group):
    files = DYNAMIC["optional-dependencies"][group]["file"]
    return [files] if isinstance(files, str) else files


def requirements(*files):
    """Return the requirements in these files, and in the files that they include."""
    found = set()
    for file in files:
        for line in filter(None, (ROOT / file).read_text(encoding="utf-8").splitlines()):
            found |= requirements(line.removeprefix("-r ")) if line.startswith("-r ") else {str(Requirement(line))}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that setuptools builds from a copy of the checkout, without a network."""
    copy = tmp_path_factory.mktemp("wheel") / "copy"
    for name in ("microbert", "requirements"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    program = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(copy / done.stdout.splitlines()[-1]) as file:
        yield file


def test_the_metadata_is_that_of_the_requirements_files(wheel):
    [path] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_string(wheel.read(path).decode())
    assert metadata["Version"] == microbert.__version__ and metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == GROUPS
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {str(one) for one in found if one.marker is None} == requirements("requirements.txt")
    for group in GROUPS:
        of_group = [one for one in found if one.marker is not None and one.marker.evaluate({"extra": group})]
        assert {f"{one.name}{one.specifier}" for one in of_group} == requirements(*files_of(group))


def test_a_wheel_holds_every_module_and_kernel(wheel):
    sources = [path for path in (ROOT / "microbert").rglob("*") if path.suffix in (".py", ".c", ".h")]
    packed = {name for name in wheel.namelist() if name.startswith("microbert/")}
    assert packed == {str(path.relative_to(ROOT)) for path in sources}


@pytest.mark.parametrize("file, group", [("requirements-bench.txt", "bench"), ("requirements-dev.txt", "dev")])
def test_a_requirements_file_lists_the_package_and_its_group(file, group):
    assert requirements(file) == requirements("requirements.txt", *files_of(group))


def test_files_that_setuptools_reads_include_no_others():
    for file in ["requirements.txt", *(file for group in GROUPS for file in files_of(group))]:
        assert not re.search(r"^-", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), file
