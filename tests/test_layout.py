"""Imports between folders point one way, few modules read the environment, and the configuration loads fast."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGE = ROOT / "microbert"
MODULES = {str(path.relative_to(PACKAGE))[:-3].replace("/", "."): path for path in sorted(PACKAGE.rglob("*.py"))}
# each imports only itself and those before it
FOLDERS = ["errors", "config", "runtime", "kernels", "data", "model", "train"]
# run as `python -m microbert.NAME`, and import any folder
COMMANDS = {"advise", "evaluate", "fill_mask", "finetune", "plot", "torchrun"}
READS_ENVIRONMENT = {"config.flags", "config.environment", "runtime.distributed"}
HEAVY = {"torch", "numpy", "transformers", "datasets", "tokenizers"}
OTHER_TESTS = {"test_shortage", "test_transformers", "test_mps"}  # of several modules of a folder
MAX_TOP_LEVEL = 16


def package_imports(source):
    """Return the modules of the package that the source imports, at its top or inside functions."""
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


def test_the_top_level_consists_of_the_folders_and_the_commands():
    assert {folder(name) for name in MODULES} == {"__init__", *FOLDERS, *COMMANDS}
    assert len({folder(name) for name in MODULES}) <= MAX_TOP_LEVEL


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_folders_before_its_own(name):
    source = MODULES[name].read_text(encoding="utf-8")
    if folder(name) in FOLDERS:
        allowed = {*FOLDERS[: FOLDERS.index(folder(name)) + 1]}
    else:
        allowed = {"errors", "config"} if name == "__init__" else {*FOLDERS, *COMMANDS}
    assert {folder(imported) for imported in package_imports(source)} <= allowed


def test_there_is_no_import_cycle():
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


def test_the_configuration_imports_no_heavy_package():
    program = "import sys, microbert.config; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "microbert" in done.stdout.split() and not HEAVY & set(done.stdout.split())


def test_each_test_file_in_a_folder_has_a_module_of_its_name():
    for path in (ROOT / "tests").glob("*/test_*.py"):
        if path.parent.name in FOLDERS:
            assert f"{path.parent.name}.{path.stem.removeprefix('test_')}" in MODULES or path.stem in OTHER_TESTS, path
