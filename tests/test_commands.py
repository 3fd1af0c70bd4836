"""The commands in README.md, CONTRIBUTING.md and docs/ run and draw their pictures, and pages.py covers all of them."""

import re

import pytest
from helpers import ROOT, end_tree
from launches import finish, free_port
from pages import MADE_BY, PAGES, SHORT, SMALL, pictures, run_page, shortened, shown, start, with_commands


def marked(page):
    """Mark README.md as slow, and the others as pages, because their commands take a quarter of an hour."""
    return pytest.param(page, marks=pytest.mark.slow if page == ROOT / "README.md" else pytest.mark.pages)


@pytest.mark.parametrize("page", [marked(page) for page in with_commands(PAGES)], ids=lambda page: page.name)
@pytest.mark.timeout(3600)
def test_the_commands_of_a_page_run_and_draw_its_pictures(page, clone, hub_environment, ran):
    run_page(page, clone, hub_environment, ran)


@pytest.mark.slow
def test_the_commands_for_several_machines_run(clone, hub_environment):
    """Both run on this machine, each with the processes of one GPU."""
    local = {"host0": "127.0.0.1", "/shared": str(clone / "shared")}
    commands = [
        re.sub("|".join(local), lambda found: local[found[0]], command)
        for command in shown(ROOT / "docs" / "multi-gpu.md")
        if "train_multinode" in command
    ]
    assert len(commands) == 2
    environment = hub_environment | {"NUM_GPUS": "1", "PORT": str(free_port())}
    processes = [start(f"{command} {SMALL}", clone, environment) for command in commands]
    try:
        for process in processes:
            code, out, _ = finish(process)
            assert code == 0, out
    finally:
        for process in processes:
            end_tree(process)
    assert (clone / "shared" / "runs" / "v3" / "model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_the_command_of_each_of_its_pictures(page):
    for picture in pictures(page):
        assert any(MADE_BY[picture][0] in command for command in shown(page)), picture


def test_every_command_has_a_short_form_and_every_short_form_is_used():
    commands = [command for page in PAGES for command in shown(page)]
    assert len([shortened(command) for command in commands]) > 50
    for pattern in SHORT:
        assert any(re.search(pattern, command) for command in commands), pattern


def test_every_picture_of_docs_has_a_command_that_draws_it():
    assert {picture.name for picture in (ROOT / "docs").glob("*.png")} == set(MADE_BY)
