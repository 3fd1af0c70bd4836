"""Kernels are compiled for their constants, saved in a private folder, and change nothing else in the process."""

import ctypes
import errno
import os
import platform
import subprocess
import sys

import pytest
import torch
from helpers import LARGEST_FILE, ROOT, TIME_LIMIT

import microbert.kernels.compile
from microbert.kernels import attention, gelu, norm
from microbert.kernels.compile import CPU_INFO, FLAGS, address, compiled_kernel, n_threads
from microbert.model import loss
from microbert.runtime.device import find_compiler, is_for_kernels

ALL = [(attention.SOURCE, {"HEAD": 3}), (gelu.SOURCE, {}), (loss.SOURCE, {}), (norm.SOURCE, {"D": 5})]
needs_compiler = pytest.mark.skipif(compiled_kernel(loss.SOURCE) is None, reason="no C compiler with OpenMP")
needs_cache = pytest.mark.skipif(
    compiled_kernel(loss.SOURCE) is None or not CPU_INFO.exists() or sys.platform != "linux",
    reason="compiled kernels are not saved here",
)


@pytest.fixture(autouse=True)
def forgotten_kernels(tmp_path_factory, monkeypatch):
    """Forget the loaded kernels, and use a cache folder of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "kernels"))
    compiled_kernel.cache_clear()
    yield
    compiled_kernel.cache_clear()


def command_for(source, constants, output, flags=FLAGS):
    """Return the command that compiles a kernel."""
    return [
        find_compiler(),
        *flags,
        *(f"-D{name}={value}" for name, value in constants.items()),
        "-o",
        output,
        source,
        "-lm",
    ]


def flags_for(processor):
    return [f"-march={processor}" if flag.startswith("-march") else flag for flag in FLAGS]


@needs_compiler
def test_a_kernel_is_compiled_once_for_its_constants():
    for source, constants in ALL:
        assert isinstance(compiled_kernel(source, **constants), ctypes.CDLL) and compiled_kernel(
            source, **constants
        ) is compiled_kernel(source, **constants)
    assert compiled_kernel(norm.SOURCE, D=5) is not compiled_kernel(norm.SOURCE, D=6)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("source, constants", ALL, ids=lambda x: getattr(x, "stem", ""))
def test_sources_compile_without_warnings_also_for_older_processors(source, constants, tmp_path):
    processors = {"x86_64": ["x86-64-v2", "haswell", "skylake-avx512"]}.get(platform.machine(), ["native"])
    for processor in processors:
        command = command_for(
            source, constants, tmp_path / "x.so", [*flags_for(processor), "-Wall", "-Wextra", "-Wno-psabi"]
        )
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("source, constants", ALL, ids=lambda x: getattr(x, "stem", ""))
def test_no_intermediate_file_is_larger_than_the_library(source, constants, tmp_path):
    """Otherwise a limit on file sizes under which a run still works would change what it computes with."""
    resource = pytest.importorskip("resource")
    command = command_for(source, constants, tmp_path / "x.so")
    subprocess.run(command, check=True)
    size = (tmp_path / "x.so").stat().st_size
    assert size < LARGEST_FILE
    subprocess.run(command, check=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def results():
    """Yield the name, output and inputs of each kernel."""
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


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of other processors")
@pytest.mark.parametrize("processor", ["x86-64-v2", "haswell"])
def test_processors_with_narrower_vectors_compute_the_same(processor, monkeypatch):
    here = [(name, output.detach(), torch.autograd.grad(output.sum(), tensors)) for name, output, tensors in results()]
    compiled_kernel.cache_clear()
    monkeypatch.setattr(microbert.kernels.compile, "FLAGS", flags_for(processor))
    for (name, output, gradients), (_, other_output, tensors) in zip(here, results(), strict=True):
        tolerance = 1e-2 if "bf16" in name or "large" in name else 1e-4
        torch.testing.assert_close(
            (output, gradients),
            (other_output.detach(), torch.autograd.grad(other_output.sum(), tensors)),
            rtol=tolerance,
            atol=tolerance,
        )


@needs_compiler
def test_the_process_keeps_denormal_numbers():
    for source, constants in ALL:
        compiled_kernel(source, **constants)
    assert torch.tensor(1e-40) * 1.0 > 0


@pytest.mark.parametrize("broken", ["no compiler", "fails", "cannot be loaded"])
def test_a_kernel_that_cannot_be_compiled_or_loaded_is_none(broken, monkeypatch):
    compiler = {"no compiler": None, "fails": "false", "cannot be loaded": "true"}[broken]  # `true` writes no library
    monkeypatch.setattr(microbert.kernels.compile, "find_compiler", lambda: compiler)
    assert compiled_kernel(loss.SOURCE) is None


def test_a_compiler_is_found_by_any_of_its_names(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/bin/gcc" if name == "gcc" else None)
    assert find_compiler() == "/bin/gcc"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert find_compiler() is None


def test_kernels_are_for_fp32_on_a_cpu():
    x = torch.ones(2)
    assert (
        is_for_kernels(x, torch.nn.Parameter(x))
        and not is_for_kernels(x, x.double())
        and not is_for_kernels(x.to("meta"))
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_for_kernels(x)


def test_arguments_of_a_kernel():
    x = torch.arange(3.0)
    assert ctypes.cast(address(x[1:]), ctypes.POINTER(ctypes.c_float))[0] == 1.0 and address(None).value is None
    assert n_threads().value == torch.get_num_threads()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of saved kernels, empty so far."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "microbert" / "kernels"


@pytest.fixture
def small_kernel(tmp_path):
    """A source that compiles fast."""
    (tmp_path / "small.c").write_text("int number(void) { return N; }\n")
    return tmp_path / "small.c"


@pytest.fixture
def load(cache, small_kernel, monkeypatch):
    """Return a function that loads a kernel as a new process would, and returns how often the compiler ran."""
    real, runs = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: runs.append(1) or real(*arguments, **options))

    def load(**constants):
        compiled_kernel.cache_clear()
        runs.clear()
        kernel = compiled_kernel(small_kernel, **({"N": 5} | constants))
        assert kernel is not None and kernel.number() == constants.get("N", 5)
        return len(runs)

    return load


@needs_cache
def test_another_process_reuses_a_saved_kernel(cache, load, small_kernel):
    program = f"""from pathlib import Path
from microbert.kernels.compile import compiled_kernel
assert compiled_kernel(Path({str(small_kernel)!r}), N=5).number() == 5"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=TIME_LIMIT)
    [saved] = cache.iterdir()
    assert saved.stat().st_uid == os.geteuid() and cache.stat().st_mode & 0o777 == 0o700
    assert load() == 0 and list(cache.iterdir()) == [saved]


@needs_cache
def test_kernels_of_other_sources_constants_flags_compilers_and_processors_have_other_files(
    cache, load, small_kernel, monkeypatch, tmp_path
):
    module = microbert.kernels.compile
    assert [load(N=5), load(N=6), load(N=5)] == [1, 1, 0]
    monkeypatch.setattr(module, "FLAGS", (*FLAGS, "-DOTHER"))
    assert load() == 1 and len(list(cache.iterdir())) == 3
    compiler, other, source = tmp_path / "cc", tmp_path / "cpuinfo", tmp_path / "other.c"
    names = {module._saved_file(small_kernel, find_compiler(), ["-O3"])}
    for content in ("a", "other version"):
        compiler.write_text(content)
        names.add(module._saved_file(small_kernel, str(compiler), ["-O3"]))
    source.write_text(small_kernel.read_text() + "\n")
    names.add(module._saved_file(source, str(compiler), ["-O3"]))
    monkeypatch.setattr(module, "CPU_INFO", other)
    for content in ("model name\t: A\nflags\t\t: sse2\n", "model name\t: A\nflags\t\t: sse2 avx\n"):
        other.write_text(f"{content}cpu MHz\t: 2000\n" * 2)
        names.add(found := module._saved_file(small_kernel, str(compiler), ["-O3"]))
        other.write_text(f"{content}cpu MHz\t: 3000\n")
        assert module._saved_file(small_kernel, str(compiler), ["-O3"]) == found
    assert len(names) == 6 and all(path.parent == cache for path in names)
    for content in ("", "processor : 0\n"):  # which processor it is, is unknown
        other.write_text(content)
        assert module._saved_file(small_kernel, str(compiler), ["-O3"]) is None


def cut_short(saved):
    saved.write_bytes(saved.read_bytes()[:5000])


def replace_content(saved):
    """By a file that is whole, and no library."""
    content = b"no library"
    saved.write_bytes(content + microbert.kernels.compile.hashlib.sha256(content).digest())


def make_empty(saved):
    saved.write_bytes(b"")


@needs_cache
@pytest.mark.parametrize("damage", [cut_short, replace_content, make_empty])
def test_a_damaged_file_is_replaced(damage, cache, load):
    assert load() == 1
    [saved] = cache.iterdir()
    saved_by_others = saved.with_suffix(".copy")  # damage must not reach the library that this process has mapped
    saved_by_others.write_bytes(saved.read_bytes())
    saved.unlink()
    saved_by_others.rename(saved)
    damage(saved)
    assert [load(), load()] == [1, 0] and list(cache.iterdir()) == [saved]


@needs_cache
@pytest.mark.parametrize("change", ["writable by others", "another owner", "a link"])
def test_a_folder_that_others_can_write_to_is_not_used(change, cache, load, tmp_path):
    assert load() == 1
    if change == "writable by others":
        cache.chmod(0o777)
    elif change == "a link":
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
    elif os.geteuid() == 0:
        os.chown(cache, 12345, 12345)
    else:
        pytest.skip("only root can give a folder away")
    before = [(path.name, path.stat().st_mtime_ns) for path in cache.iterdir()]
    assert [load(), load()] == [1, 1]
    assert [(path.name, path.stat().st_mtime_ns) for path in cache.iterdir()] == before


@needs_cache
def test_without_a_home_or_with_a_full_disk_kernels_are_compiled_but_not_saved(cache, load, monkeypatch, capfd):
    def raising(error):
        def function(*_):
            raise error

        return function

    monkeypatch.setattr(microbert.kernels.compile, "write_atomic", raising(OSError(errno.ENOSPC, "full")))
    assert [load(), load()] == [1, 1] and not list(cache.iterdir())
    monkeypatch.setattr(microbert.kernels.compile, "user_cache", raising(RuntimeError("no home")))
    assert [load(), load()] == [1, 1]
    assert capfd.readouterr() == ("", "")
