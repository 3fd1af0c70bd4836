"""What the README names exists."""

import re

import pytest
from helpers import ROOT

from microbert.config.constants import Config

README = (ROOT / "README.md").read_text(encoding="utf-8")
OTHER_FLAGS = {
    "--documents",
    "--help",
    "--label-column",
    "--lr",
    "--no-lowercase",
    "--no-torch-compile",
    "--samples",
    "--shrink",
    "--use",
    "--standalone",  # of torchrun, as the next
    "--nproc-per-node",
}


def test_the_continuous_integration_runs_the_readmes_test_command():
    command = re.search(r"^python3 -m venv .* -m pytest$", README, re.MULTILINE)
    assert command and command[0] in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("tool", ["ruff check .", "ruff format --check .", "mypy"])
def test_the_continuous_integration_runs_the_linter_and_the_type_checker(tool):
    assert f"\n.venv/bin/{tool}\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/versions.md"])
def test_every_flag_on_the_page_is_a_constant(page):
    known = {"--" + name.replace("_", "-") for name in Config.__dataclass_fields__} | OTHER_FLAGS
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / page).read_text(encoding="utf-8"))) <= known


def test_every_file_that_the_readme_links_or_installs_from_exists():
    links = (
        re.findall(r"\]\((?!http)([^)]+)\)", README)
        + re.findall(r"-r (\S+\.txt)", README)
        + re.findall(r"benchmarks/\w+\.py", README)
    )
    assert len(links) >= 4
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_layout_lists_every_folder_and_command():
    for path in (ROOT / "microbert").iterdir():
        if path.name[:2] != "__":
            assert f"\n  {path.name}{'/' if path.is_dir() else ''} " in README, path.name


def commands(text):
    """Return the lines of the code blocks, without comments and, in the layout, without descriptions of files."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [re.split(r"\s+# |(?<=[a-z/])  +", line)[0] for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize(
    "of",
    [
        commands,
        lambda text: [link.replace(".zh-CN", "") for link in re.findall(r"\]\(([^)]+)\)", text)],
        lambda text: sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))),
        lambda text: sorted(re.findall(r"(?<![\w.])\d+\.\d{2,}(?![\w.])", text, re.ASCII)),
        lambda text: len(re.findall(r"^#+ ", text, re.MULTILINE)),
        lambda text: text.count("|"),
    ],
    ids=["commands", "links", "flags", "figures", "headings", "tables"],
)
@pytest.mark.parametrize("page", ["README.md", "docs/versions.md"])
def test_the_chinese_page_has_the_same_content(page, of):
    assert of((ROOT / page.replace(".md", ".zh-CN.md")).read_text(encoding="utf-8")) == of(
        (ROOT / page).read_text(encoding="utf-8")
    )
