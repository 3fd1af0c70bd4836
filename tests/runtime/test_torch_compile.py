"""torch.compile saves its kernels in folders that no other user can write to."""

import getpass
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TIME_LIMIT, listing

import microbert.runtime.torch_compile
from microbert.config.environment import COMPILER_CACHES
from microbert.runtime.torch_compile import compiled


def mode_of(folder):
    return stat.S_IMODE(folder.stat().st_mode)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Return a function that calls `compiled` with environment variables, and returns the folders that it set.

    It compiles nothing.
    """
    import torch._inductor.config  # sets a variable itself

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(sys, "platform", "linux")

    def compile_with(**variables):
        for name, value in (
            {name: "" for name in COMPILER_CACHES} | {"XDG_CACHE_HOME": tmp_path / "cache"} | variables
        ).items():
            monkeypatch.setenv(name, str(value))
        microbert.runtime.torch_compile._use_private_caches.cache_clear()
        torch._inductor.config.cpp_cache_precompile_headers = True
        compiled(abs)
        assert not torch._inductor.config.cpp_cache_precompile_headers  # they would stay in /tmp
        return [Path(os.environ[name]) for name in COMPILER_CACHES]

    yield compile_with
    microbert.runtime.torch_compile._use_private_caches.cache_clear()


def test_compiled_kernels_are_saved_in_the_users_cache(caches, tmp_path, capsys):
    own = [tmp_path / "cache" / "microbert" / name for name in ("torchinductor", "triton")]
    assert caches() == own and {mode_of(folder) for folder in own} == {0o700}
    # torch sets this one when its compiler is imported
    default = Path(microbert.runtime.torch_compile.tempfile.gettempdir()) / "torchinductor_somebody"
    assert caches(TORCHINDUCTOR_CACHE_DIR=default) == own and not default.exists()
    (tmp_path / "mine").mkdir()
    assert caches(TORCHINDUCTOR_CACHE_DIR=tmp_path / "mine", TRITON_CACHE_DIR=tmp_path / "new") == [
        tmp_path / "mine",
        tmp_path / "new",
    ]
    assert mode_of(tmp_path / "new") == 0o700 and capsys.readouterr().out == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows protects folders by access lists")
def test_a_cache_that_is_not_private_is_reported_and_replaced_by_another(caches, tmp_path, capsys):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert caches(TRITON_CACHE_DIR=tmp_path / "open")[1] == tmp_path / "cache" / "microbert" / "triton"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "other users" in printed
    assert f"TRITON_CACHE_DIR = {tmp_path / 'open'} is not used" in printed
    folders = caches(XDG_CACHE_HOME=tmp_path / "open")
    assert all(mode_of(folder.parent) == 0o700 and folder.parent.name.startswith("microbert-") for folder in folders)
    printed = capsys.readouterr().out
    assert printed.count("warning: compiled kernels are not saved") == len(printed.splitlines()) > 0
    assert not list((tmp_path / "open").iterdir())


@pytest.mark.slow
def test_files_in_torchs_default_folder_are_neither_read_nor_changed(tmp_path):
    hostile = tmp_path / "tmp" / f"torchinductor_{getpass.getuser()}"
    for name in ("fxgraph", "aotautograd", "precompiled_headers"):
        (hostile / name).mkdir(parents=True)
        (hostile / name / "planted").write_text("")
    before = listing(hostile)
    program = (
        "import torch; from microbert.runtime.torch_compile import compiled; "
        "print(compiled(lambda x: x.sin() + 1)(torch.ones(3)))"
    )
    environment = {
        **os.environ,
        "TMPDIR": str(hostile.parent),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        **dict.fromkeys(COMPILER_CACHES, ""),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert done.returncode == 0 and "1.8415" in done.stdout, done.stderr
    assert listing(hostile) == before and listing(tmp_path / "cache" / "microbert" / "torchinductor")
