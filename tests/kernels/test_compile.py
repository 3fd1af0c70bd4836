"""Kernels are compiled where they can be, for constants of their own, and change nothing else in the process."""

import ctypes
import getpass
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LARGEST_FILE, ROOT, TIME_LIMIT, listing

import microbert.kernels.compile
import microbert.runtime.torch_compile
from microbert.config.environment import COMPILER_CACHES
from microbert.kernels import attention, gelu, norm
from microbert.kernels.compile import address, compiled_kernel, n_threads
from microbert.model import loss
from microbert.runtime.device import find_compiler, is_for_kernels
from microbert.runtime.files import private_folder
from microbert.runtime.torch_compile import compiled

ALL = [(attention.SOURCE, {"HEAD": 3}), (gelu.SOURCE, {}), (loss.SOURCE, {}), (norm.SOURCE, {"D": 5})]
needs_compiler = pytest.mark.skipif(compiled_kernel(loss.SOURCE) is None, reason="no C compiler with OpenMP")


@pytest.fixture(autouse=True)
def forgotten_kernels():
    compiled_kernel.cache_clear()
    yield
    compiled_kernel.cache_clear()


@needs_compiler
def test_a_kernel_is_compiled_once_for_its_constants():
    for source, constants in ALL:
        assert isinstance(compiled_kernel(source, **constants), ctypes.CDLL) and compiled_kernel(
            source, **constants
        ) is compiled_kernel(source, **constants)
    assert compiled_kernel(norm.SOURCE, D=5) is not compiled_kernel(norm.SOURCE, D=6)


@needs_compiler
@pytest.mark.parametrize("source, constants", ALL, ids=lambda x: getattr(x, "stem", ""))
def test_sources_compile_without_a_warning_for_old_processors_too(source, constants, tmp_path):
    processors = {"x86_64": ["x86-64-v2", "haswell", "skylake-avx512"]}.get(platform.machine(), ["native"])
    for processor in processors:
        flags = [
            f"-march={processor}" if flag.startswith("-march") else flag for flag in microbert.kernels.compile.FLAGS
        ]
        done = subprocess.run(
            [
                find_compiler(),
                *flags,
                "-Wall",
                "-Wextra",
                "-Wno-psabi",
                *(f"-D{name}={value}" for name, value in constants.items()),
                "-o",
                tmp_path / "x.so",
                source,
                "-lm",
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and not done.stderr


@needs_compiler
@pytest.mark.parametrize("source, constants", ALL, ids=lambda x: getattr(x, "stem", ""))
def test_no_file_on_the_way_to_a_library_is_longer_than_it(source, constants, tmp_path):
    """So that a limit on files that lets a run go on does not change what it computes with."""
    resource = pytest.importorskip("resource")
    command = [
        find_compiler(),
        *microbert.kernels.compile.FLAGS,
        *(f"-D{name}={value}" for name, value in constants.items()),
        "-o",
        tmp_path / "x.so",
        source,
        "-lm",
    ]
    subprocess.run(command, check=True)
    size = (tmp_path / "x.so").stat().st_size
    assert size < LARGEST_FILE
    subprocess.run(command, check=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def results():
    """Of each kernel, with gradients."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    query, key, value = numbers(2, 2, 19, 3), numbers(2, 2, 23, 3), numbers(2, 2, 23, 3)
    labels = torch.arange(31) % 3 * 40 + loss.IGNORED
    yield "attention", attention.attend(query, key, value, None), (query, key, value)
    yield "large scores", attention.attend(40 * query, 40 * key, value, None), (query, key, value)
    for n_embed in (6, 40):
        tensors = numbers(31, n_embed), numbers(97, n_embed), numbers(97)
        yield f"loss, {n_embed}", loss.masked_loss(*tensors, labels, 20), tensors
        yield f"loss, {n_embed}, bf16", loss.masked_loss(*tensors, labels, 20, torch.bfloat16), tensors
    tensors = numbers(20, 5), numbers(5), numbers(5)
    yield "norm", norm.layer_norm(*tensors, 1e-12), tensors
    yield "gelu", gelu.gelu(x := numbers(7, 21)), (x,)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of other processors")
@pytest.mark.parametrize("processor", ["x86-64-v2", "haswell"])
def test_processors_with_narrower_vectors_compute_the_same(processor, monkeypatch):
    here = [(name, output.detach(), torch.autograd.grad(output.sum(), tensors)) for name, output, tensors in results()]
    compiled_kernel.cache_clear()
    monkeypatch.setattr(
        microbert.kernels.compile,
        "FLAGS",
        [f"-march={processor}" if flag.startswith("-march") else flag for flag in microbert.kernels.compile.FLAGS],
    )
    for (name, output, gradients), (_, other_output, tensors) in zip(here, results(), strict=True):
        tolerance = 1e-2 if "bf16" in name or "large" in name else 1e-4
        torch.testing.assert_close(
            (output, gradients),
            (other_output.detach(), torch.autograd.grad(other_output.sum(), tensors)),
            rtol=tolerance,
            atol=tolerance,
        )


@needs_compiler
def test_denormal_numbers_are_not_lost_to_the_process():
    for source, constants in ALL:
        compiled_kernel(source, **constants)
    assert torch.tensor(1e-40) * 1.0 > 0


@pytest.mark.parametrize("broken", ["no compiler", "fails", "cannot be loaded"])
def test_what_cannot_be_compiled_or_loaded_is_none(broken, monkeypatch):
    compiler = {"no compiler": None, "fails": "false", "cannot be loaded": "true"}[broken]  # `true` writes no library
    monkeypatch.setattr(microbert.kernels.compile, "find_compiler", lambda: compiler)
    assert compiled_kernel(loss.SOURCE) is None


def test_a_compiler_is_found_by_any_of_its_names(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/bin/gcc" if name == "gcc" else None)
    assert find_compiler() == "/bin/gcc"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert find_compiler() is None


def test_they_are_for_numbers_in_fp32_on_a_cpu():
    x = torch.ones(2)
    assert (
        is_for_kernels(x, torch.nn.Parameter(x))
        and not is_for_kernels(x, x.double())
        and not is_for_kernels(x.to("meta"))
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_for_kernels(x)


def test_what_a_kernel_is_given():
    x = torch.arange(3.0)
    assert ctypes.cast(address(x[1:]), ctypes.POINTER(ctypes.c_float))[0] == 1.0 and address(None).value is None
    assert n_threads().value == torch.get_num_threads()


def mode_of(folder):
    return stat.S_IMODE(folder.stat().st_mode)


def test_a_private_folder_is_made_for_its_owner_alone_and_used_again(tmp_path):
    before = os.umask(0)  # under which a folder would be open to everybody
    try:
        assert private_folder(tmp_path / "a" / "b") == (tmp_path / "a" / "b").resolve()
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a") == mode_of(tmp_path / "a" / "b") == 0o700
    (tmp_path / "a" / "b").chmod(0o755)  # others may read what is in it
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert private_folder(tmp_path / "link" / "b") == (tmp_path / "a" / "b").resolve()


def make_link(folder):
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")


def make_file(folder):
    folder.write_text("")


def make_with_mode(mode):
    def make(folder):
        folder.mkdir()
        folder.chmod(mode)

    return make


def make_of_somebody_else(folder):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    folder.mkdir()
    os.chown(folder, 12345, 12345)


@pytest.mark.skipif(os.name == "nt", reason="Windows protects folders by access lists")
@pytest.mark.parametrize(
    "make, told",
    [
        (make_link, "is a link"),
        (make_file, "not a folder|exists"),
        (make_with_mode(0o770), "written to by other"),
        (make_with_mode(0o1777), "written to by other"),
        (make_of_somebody_else, "belongs to another user"),
    ],
)
def test_a_folder_that_another_user_can_write_to_is_refused(make, told, tmp_path):
    make(tmp_path / "folder")
    with pytest.raises(OSError, match=told):
        private_folder(tmp_path / "folder")


@pytest.mark.skipif(os.name == "nt", reason="Windows protects folders by access lists")
@pytest.mark.parametrize(
    "make, told",
    [
        (make_with_mode(0o777), "written to by other"),
        (make_with_mode(0o1777), ""),
        (make_of_somebody_else, "belongs to another user"),
    ],
)
def test_a_folder_that_another_user_can_replace_is_refused(make, told, tmp_path):
    """Where folders above it are another user's, or may be written to by others and are not sticky, as /tmp is."""
    make(tmp_path / "above")
    (tmp_path / "above" / "folder").mkdir(mode=0o700)
    if told:
        with pytest.raises(OSError, match=told):
            private_folder(tmp_path / "above" / "folder")
    else:
        private_folder(tmp_path / "above" / "folder")


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Calls `compiled` with these variables in the environment, and returns the folders that it set. It compiles nothing."""
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
    default = (
        Path(microbert.runtime.torch_compile.tempfile.gettempdir()) / "torchinductor_somebody"
    )  # torch sets this one when its compiler is imported
    assert caches(TORCHINDUCTOR_CACHE_DIR=default) == own and not default.exists()
    (tmp_path / "mine").mkdir()
    assert caches(TORCHINDUCTOR_CACHE_DIR=tmp_path / "mine", TRITON_CACHE_DIR=tmp_path / "new") == [
        tmp_path / "mine",
        tmp_path / "new",
    ]
    assert mode_of(tmp_path / "new") == 0o700 and capsys.readouterr().out == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows protects folders by access lists")
def test_a_cache_that_is_not_private_is_named_and_another_one_used(caches, tmp_path, capsys):
    make_with_mode(0o777)(tmp_path / "open")
    assert caches(TRITON_CACHE_DIR=tmp_path / "open")[1] == tmp_path / "cache" / "microbert" / "triton"
    told = capsys.readouterr().out
    assert (
        told.count("\n") == 1
        and f"TRITON_CACHE_DIR = {tmp_path / 'open'} is not used" in told
        and "other users" in told
    )
    folders = caches(XDG_CACHE_HOME=tmp_path / "open")
    assert all(mode_of(folder.parent) == 0o700 and folder.parent.name.startswith("microbert-") for folder in folders)
    told = capsys.readouterr().out
    assert told.count("warning: no compiled kernels are saved") == len(told.splitlines()) > 0
    assert not list((tmp_path / "open").iterdir())


@pytest.mark.slow
def test_what_lies_where_torch_would_look_for_compiled_kernels_is_not_touched(tmp_path):
    hostile = tmp_path / "tmp" / f"torchinductor_{getpass.getuser()}"
    for name in ("fxgraph", "aotautograd", "precompiled_headers"):
        (hostile / name).mkdir(parents=True)
        (hostile / name / "planted").write_text("")
    before = listing(hostile)
    program = "import torch; from microbert.runtime.torch_compile import compiled; print(compiled(lambda x: x.sin() + 1)(torch.ones(3)))"
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
