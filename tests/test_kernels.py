"""Kernels are compiled where they can be, for constants of their own, and change nothing else in the process."""

import ctypes
import platform
import subprocess

import pytest
import torch
from helpers import LARGEST_FILE

import microbert.kernels
from microbert import attention, gelu, loss, norm
from microbert.device import find_compiler, is_for_kernels
from microbert.kernels import address, compiled_kernel, n_threads

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
        assert isinstance(compiled_kernel(source, **constants), ctypes.CDLL) and compiled_kernel(source, **constants) is compiled_kernel(source, **constants)
    assert compiled_kernel(norm.SOURCE, D=5) is not compiled_kernel(norm.SOURCE, D=6)


@needs_compiler
@pytest.mark.parametrize("source, constants", ALL, ids=lambda x: getattr(x, "stem", ""))
def test_sources_compile_without_a_warning_for_old_processors_too(source, constants, tmp_path):
    processors = {"x86_64": ["x86-64-v2", "haswell", "skylake-avx512"]}.get(platform.machine(), ["native"])
    for processor in processors:
        flags = [f"-march={processor}" if flag.startswith("-march") else flag for flag in microbert.kernels.FLAGS]
        done = subprocess.run([find_compiler(), *flags, "-Wall", "-Wextra", "-Wno-psabi", *(f"-D{name}={value}" for name, value in constants.items()), "-o", tmp_path / "x.so",
                               source, "-lm"], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr


@needs_compiler
@pytest.mark.parametrize("source, constants", ALL, ids=lambda x: getattr(x, "stem", ""))
def test_no_file_on_the_way_to_a_library_is_longer_than_it(source, constants, tmp_path):
    """So that a limit on files that lets a run go on does not change what it computes with."""
    resource = pytest.importorskip("resource")
    command = [find_compiler(), *microbert.kernels.FLAGS, *(f"-D{name}={value}" for name, value in constants.items()), "-o", tmp_path / "x.so", source, "-lm"]
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
    monkeypatch.setattr(microbert.kernels, "FLAGS", [f"-march={processor}" if flag.startswith("-march") else flag for flag in microbert.kernels.FLAGS])
    for (name, output, gradients), (_, other_output, tensors) in zip(here, results(), strict=True):
        tolerance = 1e-2 if "bf16" in name or "large" in name else 1e-4
        torch.testing.assert_close((output, gradients), (other_output.detach(), torch.autograd.grad(other_output.sum(), tensors)), rtol=tolerance, atol=tolerance)


@needs_compiler
def test_denormal_numbers_are_not_lost_to_the_process():
    for source, constants in ALL:
        compiled_kernel(source, **constants)
    assert torch.tensor(1e-40) * 1.0 > 0


@pytest.mark.parametrize("broken", ["no compiler", "fails", "cannot be loaded"])
def test_what_cannot_be_compiled_or_loaded_is_none(broken, monkeypatch):
    compiler = {"no compiler": None, "fails": "false", "cannot be loaded": "true"}[broken]  # `true` writes no library
    monkeypatch.setattr(microbert.kernels, "find_compiler", lambda: compiler)
    assert compiled_kernel(loss.SOURCE) is None


def test_a_compiler_is_found_by_any_of_its_names(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/bin/gcc" if name == "gcc" else None)
    assert find_compiler() == "/bin/gcc"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert find_compiler() is None


def test_they_are_for_numbers_in_fp32_on_a_cpu():
    x = torch.ones(2)
    assert is_for_kernels(x, torch.nn.Parameter(x)) and not is_for_kernels(x, x.double()) and not is_for_kernels(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_for_kernels(x)


def test_what_a_kernel_is_given():
    x = torch.arange(3.0)
    assert ctypes.cast(address(x[1:]), ctypes.POINTER(ctypes.c_float))[0] == 1.0 and address(None).value is None
    assert n_threads().value == torch.get_num_threads()
