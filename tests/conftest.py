import os

import pytest
from helpers import result, run, small_flags
from hypothesis import HealthCheck, settings

settings.register_profile("suite", deadline=20_000)  # milliseconds for one input, with room for a busy machine
settings.register_profile("thorough", settings.get_profile("suite"), max_examples=10_000, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")

# before torch is loaded, for this process and those that it starts: on few cores, more threads than tests mostly wait for each other
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A folder with a small corpus and the uninterrupted run on it, the reference for every interrupted one."""
    folder = tmp_path_factory.mktemp("reference")
    done = run(small_flags(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def reference(finished_run):
    return result(finished_run / "run")
