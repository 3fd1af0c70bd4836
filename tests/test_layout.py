"""Folders import one way, the environment is read in few modules, configuration loads fast, linter and type checker pass."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGE = ROOT / "microbert"
MODULES = {str(path.relative_to(PACKAGE))[:-3].replace("/", "."): path for path in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = [
    "errors",
    "config",
    "runtime",
    "kernels",
    "data",
    "model",
    "train",
]  # each imports only itself and those before it
COMMANDS = {
    "advise",
    "fill_mask",
    "finetune",
    "plot",
    "torchrun",
}  # run as `python -m microbert.NAME`; on top of the folders
READS_ENVIRONMENT = {"config.flags", "config.environment", "runtime.distributed"}
HEAVY = {"torch", "numpy", "transformers", "datasets", "tokenizers"}


def package_imports(source):
    """Return the modules of the package that the source imports, also those imported inside functions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name.removeprefix("microbert.") in MODULES else node.module for name in submodules]
    return {name.removeprefix("microbert.") for name in found if name.startswith("microbert.")}


def environment_reads(source):
    """Return what the source reads from the environment or the command line."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & {"os.environ", "os.environb", "os.getenv", "sys.argv", "sys.orig_argv"}


def folder(module):
    return module.split(".")[0]


def test_the_top_level_holds_the_folders_and_the_commands():
    assert {folder(name) for name in MODULES} == {"__init__", *FOLDERS, *COMMANDS}
    assert len({folder(name) for name in MODULES}) <= 16


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    source = MODULES[name].read_text(encoding="utf-8")
    if folder(name) in FOLDERS:
        allowed = {*FOLDERS[: FOLDERS.index(folder(name)) + 1]}
    else:
        allowed = {"errors", "config"} if name == "__init__" else {*FOLDERS, *COMMANDS}
    assert {folder(imported) for imported in package_imports(source)} <= allowed


def test_no_module_imports_itself_by_way_of_others():
    imports = {name: package_imports(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    done = set()

    def visit(name, path):
        assert name not in path, f"import cycle: {' -> '.join([*path, name])}"
        if name not in done:
            for imported in sorted(imports.get(name, ())):
                visit(imported, [*path, name])
            done.add(name)

    for name in imports:
        visit(name, [])


@pytest.mark.parametrize(
    "source, modules",
    [
        ("import microbert.model.loss", {"model.loss"}),
        ("from microbert.model import loss, bert", {"model.loss", "model.bert"}),
        ("def f():\n  from microbert.model.loss import x", {"model.loss"}),
        ("import os\nfrom torch import nn", set()),
    ],
)
def test_every_form_of_import_is_found(source, modules):
    assert package_imports(source) == modules


@pytest.mark.parametrize("name", MODULES)
def test_few_modules_read_the_environment_or_the_command_line(name):
    read = environment_reads(MODULES[name].read_text(encoding="utf-8"))
    assert not read or name in READS_ENVIRONMENT or (name in COMMANDS | {"__init__"} and read == {"sys.argv"})


def test_configuration_loads_nothing_heavy():
    program = "import sys, microbert.config; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "microbert" in done.stdout.split() and not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("command", [["ruff", "check", "--no-cache"], ["ruff", "format", "--no-cache", "--check"]])
def test_the_linter_finds_nothing(command):
    done = subprocess.run([sys.executable, "-m", *command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_tests_mirror_the_folders():
    for path in (ROOT / "tests").glob("*/test_*.py"):
        if path.parent.name in FOLDERS:
            assert f"{path.parent.name}.{path.stem.removeprefix('test_')}" in MODULES or path.stem in OTHER_TESTS, path


OTHER_TESTS = {"test_shortage", "test_transformers", "test_mps"}  # of several modules of a folder
