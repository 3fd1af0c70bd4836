"""No source executes data that it reads, and the table of faults in docs/reliability.md names the right tests."""

import ast
import re

import pytest
from helpers import ROOT

SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "microbert").rglob("*.py")])
EXECUTES_DATA = {
    "eval",
    "exec",
    "pickle",
    "torch.load",
    "os.system",
    "os.popen",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "cloudpickle",
}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return getattr(node, "id", "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_executes_data(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert dotted(node.func) not in EXECUTES_DATA
            options = {option.arg: getattr(option.value, "value", None) for option in node.keywords}
            assert not options.get("shell") and not options.get("trust_remote_code") and not options.get("allow_pickle")
            assert dotted(node.func) != "np.load" or options.get("allow_pickle") is False
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            assert not EXECUTES_DATA & {
                module,
                *(f"{module}.{alias.name}" if module else alias.name for alias in node.names),
            }


def test_the_table_of_faults_names_the_files_of_its_tests():
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call) and dotted(decorator.func) == "pytest.mark.fault":
                    found.setdefault(decorator.keywords[0].value.value, set()).add(f"../{path.relative_to(ROOT)}")
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE)
    assert {int(row): set(re.findall(r"\]\((.*?)\)", tests)) for row, tests in rows} == found
    assert sorted(found) == list(range(1, 35))
