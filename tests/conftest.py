import os

import pytest
from helpers import result, run, small_flags
from hypothesis import HealthCheck, settings

settings.register_profile("suite", deadline=20_000)  # milliseconds for one input, with room for a busy machine
settings.register_profile(
    "thorough", settings.get_profile("suite"), max_examples=10_000, suppress_health_check=list(HealthCheck)
)
settings.load_profile("suite")

LONGEST = ("test_commands", "test_crash_and_resume", "test_version_4")  # files by their names

# set before torch is loaded, also for subprocesses: with more threads than cores, tests wait for each other
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    """Run the files that take minutes first, so that both workers end at about the same time."""
    items.sort(key=lambda item: not item.path.name.startswith(LONGEST))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Return a folder with a small corpus and an uninterrupted run on it, the reference for interrupted ones."""
    folder = tmp_path_factory.mktemp("reference")
    done = run(small_flags(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def reference(finished_run):
    return result(finished_run / "run")


@pytest.fixture(scope="session")
def header_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("headers")


@pytest.fixture
def precompiled_headers(header_folder, monkeypatch):
    """Let torch.compile read its headers once for all kernels, from a folder of the tests; runs must not."""
    import torch
    from torch._inductor import codecache, config

    real = torch.compile

    def compile_with_headers(*arguments, **options):
        config.cpp_cache_precompile_headers = True
        return real(*arguments, **options)

    monkeypatch.setattr(codecache, "_HEADER_DIR", str(header_folder))
    monkeypatch.setattr(codecache, "_HEADER_LOCK_DIR", str(header_folder / "locks"))
    monkeypatch.setattr(torch, "compile", compile_with_headers)
    with config.patch(cpp_cache_precompile_headers=False):  # restores it at the end
        yield


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    from pages import make_clone  # here, because it loads much

    folder = tmp_path_factory.mktemp("fresh") / "clone"
    make_clone(folder)
    return folder


@pytest.fixture(scope="module")
def hub_environment(clone):
    from pages import small_hub

    with small_hub(clone) as environment:
        yield environment


@pytest.fixture(scope="module")
def ran():
    """Return the commands that earlier pages have run."""
    return set()
