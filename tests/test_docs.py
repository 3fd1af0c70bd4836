"""What docs/ shows exists: code as in the sources, pictures and links."""

import re

import pytest
from helpers import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_has_a_target(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_quoted_from_the_source(page):
    shown = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for source, code in shown:
        assert code in (ROOT / source).read_text(encoding="utf-8"), (source, code)
    assert shown or page.name != "how-it-works.md"


def test_every_picture_in_docs_is_on_a_page():
    shown = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "README.md"])
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.name in shown, picture.name
