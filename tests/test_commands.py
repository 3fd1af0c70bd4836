"""The commands that README.md and CONTRIBUTING.md show run, and make their pictures; and pages.py knows every page's commands and pictures."""

import re

import pytest
from helpers import ROOT
from pages import DOCS, MADE_BY, PAGES, SHORT, pictures, run_page, shortened, shown, with_commands


@pytest.mark.parametrize("page", with_commands([page for page in PAGES if page not in DOCS]), ids=lambda page: page.name)
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_of_a_page_run_and_make_its_pictures(page, clone, hub_environment, ran):
    run_page(page, clone, hub_environment, ran)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_the_command_of_each_of_its_pictures(page):
    for picture in pictures(page):
        assert any(MADE_BY[picture][0] in command for command in shown(page)), picture


def test_every_command_is_told_how_to_run_and_every_way_is_used():
    commands = [command for page in PAGES for command in shown(page)]
    assert len([shortened(command) for command in commands]) > 50
    for pattern in SHORT:
        assert any(re.search(pattern, command) for command in commands), pattern


def test_every_picture_of_docs_is_made_by_a_command():
    assert {picture.name for picture in (ROOT / "docs").glob("*.png")} == set(MADE_BY)
