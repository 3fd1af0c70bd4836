"""The commands that the pages of docs/ show run, page by page, and make their pictures. A file of its own: as long as README.md's, and beside it."""

import re

import pytest
from helpers import ROOT, end_tree
from launches import finish, free_port
from pages import DOCS, SMALL, run_page, shown, start, with_commands


@pytest.mark.parametrize("page", with_commands(DOCS), ids=lambda page: page.name)
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_of_a_page_run_and_make_its_pictures(page, clone, hub_environment, ran):
    run_page(page, clone, hub_environment, ran)


@pytest.mark.slow
def test_the_commands_for_several_machines_run(clone, hub_environment):
    """Both on this one, each with the processes of one GPU."""
    there = {"host0": "127.0.0.1", "/shared": str(clone / "shared")}
    commands = [re.sub("|".join(there), lambda found: there[found[0]], command) for command in shown(ROOT / "docs" / "multi-gpu.md") if "train_multinode" in command]
    assert len(commands) == 2
    of_each = hub_environment | {"NUM_GPUS": "1", "PORT": str(free_port())}
    processes = [start(f"{command} {SMALL}", clone, of_each) for command in commands]
    try:
        for process in processes:
            code, out, _ = finish(process)
            assert code == 0, out
    finally:
        for process in processes:
            end_tree(process)
    assert (clone / "shared" / "runs" / "v3" / "model.safetensors").exists()
