"""Imports point one way, the environment is read in two modules, config stays light, and the linter has nothing to say."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGE = ROOT / "microbert"
ORDER = [
    "output", "dataset_names", "dependencies", "config", "files", "counter_rng", "distributed", "device", "cuda_graph", "run",
    "workers", "report", "documents", "columns", "file_kinds", "delimited", "tables", "file_formats", "local_files", "hub_reader", "hub", "corpus", "labelled",
    "tokenizer", "encoder", "tokens", "prepare", "batches", "masking", "kernels", "attention", "norm", "gelu",
    "layers", "bert", "modern", "model", "loss", "optim", "memory", "course", "step", "hugging_face", "examples",
    "export", "classifier", "checkpoint", "start", "training", "dry_run", "advise", "fill_mask", "finetune",
    "plot", "torchrun",
]
READS_SURROUNDINGS = {"config", "distributed"}
HEAVY = {"torch", "numpy", "transformers", "datasets", "tokenizers"}


def own_imports(tree):
    """Modules of the package that the source imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("microbert."))
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "microbert"):
            module = node.module or "" if node.level else node.module.partition(".")[2]
            yield from [module.split(".")[0]] if module else [alias.name for alias in node.names]


def surroundings(tree):
    """Where the source takes something from the environment or the command line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(name):
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def test_the_linter_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_module_has_its_place_in_the_order():
    assert sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__") == sorted(ORDER)
    assert set(own_imports(parse("__init__"))) == {"dataset_names", "dependencies"}  # which load nothing


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_earlier_ones(name):
    assert set(own_imports(parse(name))) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("source, modules", [("import microbert.loss", ["loss"]), ("from . import loss, run", ["loss", "run"]),
                                             ("def f():\n  from .loss import x", ["loss"]), ("from microbert.loss import x", ["loss"]),
                                             ("from microbert import loss", ["loss"]), ("import os\nfrom torch import nn", [])])
def test_every_form_of_import_is_seen(source, modules):
    assert list(own_imports(ast.parse(source))) == modules


@pytest.mark.parametrize("name", ORDER)
def test_only_two_modules_read_the_environment_or_the_command_line(name):
    read = set(surroundings(parse(name))) & {"os.environ", "os.environb", "os.getenv", "sys.argv", "sys.orig_argv"}
    assert not read or name in READS_SURROUNDINGS


def test_config_loads_nothing_heavy():
    program = "import sys, microbert.config; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert "microbert" in loaded and not HEAVY & set(loaded)
