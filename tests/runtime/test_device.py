"""The device: which one is chosen, how much memory it may use, and its errors. CUDA's functions are replaced."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from configs import configure, configure_v4
from helpers import ROOT

import microbert.runtime.device
from microbert.errors import InputError
from microbert.runtime.device import (
    choose_device,
    compute_dtype,
    describe_compute,
    is_captured,
    is_compiled,
    limit_memory,
    memory_bytes,
    out_of_memory,
)
from microbert.runtime.distributed import World

GIB = 2**30


@pytest.fixture
def two_gpus(monkeypatch):
    """Simulate two GPUs of 40 GiB with bf16. Return the memory fractions set for their allocators, by device."""
    fractions = {}
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": lambda device: None,
        "memory._lazy_init": lambda: None,
        "get_device_properties": lambda device: type("properties", (), {"total_memory": 40 * GIB}),
        "get_device_capability": lambda device: (8, 0),
        "is_bf16_supported": lambda including_emulation: True,
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda fraction, index: fractions.update({index: fraction}), raising=False
    )
    return fractions


@pytest.mark.parametrize(
    "name, environment, index",
    [
        ("auto", {}, 0),
        ("cuda", {}, 0),
        ("cuda:1", {}, 1),
        ("auto", {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 1),
    ],
)
def test_a_gpu_has_a_number_and_its_allocator_a_limit(name, environment, index, two_gpus):
    device = choose_device(name, World(environment))
    assert device == torch.device("cuda", index) and memory_bytes(device, World(environment)) == 40 * GIB
    limit_memory(device, 10 * GIB)
    assert two_gpus == {index: 0.25}
    limit_memory(device, 50 * GIB)
    assert two_gpus == {index: 1.0}


@pytest.mark.parametrize(
    "name, environment, message",
    [
        ("cuda:2", {}, "finds 2 GPUs"),
        ("cuda", {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, "start one per GPU"),
    ],
)
def test_a_missing_gpu_is_reported(name, environment, message, two_gpus):
    with pytest.raises(InputError, match=message):
        choose_device(name, World(environment))


def test_dtype_compilation_and_graphs_are_chosen_by_device_unless_set(two_gpus, monkeypatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(microbert.runtime.device.importlib.util, "find_spec", lambda name: object())
    assert describe_compute(configure_v4(), gpu) == ", in bf16, compiled, with CUDA graphs"
    assert describe_compute(configure(), gpu) == ", with CUDA graphs"
    assert describe_compute(configure_v4("--no-cuda-graphs"), gpu) == ", in bf16, compiled"
    assert not is_captured(configure(), cpu)
    assert compute_dtype(configure_v4("--dtype", "bfloat16"), cpu) == torch.bfloat16
    assert compute_dtype(configure_v4("--dtype", "float32"), gpu) == torch.float32
    assert is_compiled(configure_v4("--torch-compile"), cpu)
    assert not is_compiled(configure_v4("--no-torch-compile"), gpu)
    monkeypatch.setattr(microbert.runtime.device.shutil, "which", lambda name: None)  # no C compiler
    assert not is_compiled(configure_v4(), gpu)


@pytest.mark.parametrize(
    "capabilities, n_embed, is_bf16",
    [
        ({"amx_bf16": True}, 128, True),
        ({"amx_bf16": True}, 32, False),
        ({"avx512_bf16": True}, 128, True),
        ({"avx2": True, "amx_bf16": False}, 128, False),
    ],
)
def test_a_cpu_with_units_for_bf16_uses_them_for_wide_matrices(capabilities, n_embed, is_bf16, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    config, cpu = configure_v4("--n-embed", str(n_embed)), torch.device("cpu")
    assert (compute_dtype(config, cpu) == torch.bfloat16) == is_bf16 == (describe_compute(config, cpu) == ", in bf16")
    assert compute_dtype(configure_v4("--dtype", "float32"), cpu) == torch.float32


def test_a_pytorch_that_does_not_report_the_units_of_a_cpu_uses_fp32(monkeypatch):
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    assert compute_dtype(configure_v4(), torch.device("cpu")) == torch.float32


def test_processes_share_the_memory_of_the_machine_or_container(tmp_path, monkeypatch):
    cpu, limit = torch.device("cpu"), tmp_path / "memory.max"
    monkeypatch.setattr(microbert.runtime.device, "CGROUP_LIMIT", limit)
    machine = memory_bytes(cpu, World.alone())
    assert machine > GIB and memory_bytes(cpu, World({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})) == machine // 2
    limit.write_text("max\n")
    assert memory_bytes(cpu, World.alone()) == machine
    limit.write_text(f"{GIB}\n")
    assert memory_bytes(cpu, World.alone()) == GIB


def test_the_error_of_a_real_allocation_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert "can't allocate memory" in out_of_memory(caught.value)
    assert out_of_memory(RuntimeError("size mismatch")) == out_of_memory(ValueError("out of memory")) == ""


def test_peak_memory_does_not_include_the_parent_process():
    held = np.ones(60_000_000)  # half a GB in the parent
    program = """import sys, torch
sys.path.insert(0, sys.argv[1])
from microbert.runtime.device import peak_memory_gb
before = peak_memory_gb(torch.device("cpu"))
x = torch.ones(50_000_000)
print(before, peak_memory_gb(torch.device("cpu")))"""
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.05 < before < held.nbytes / 1e9 and after - before == pytest.approx(0.2, abs=0.05)


def test_processes_on_one_machine_share_its_cores(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr("microbert.runtime.device.n_cores", lambda: 12)
    environment = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}
    try:
        choose_device("cpu", World({**environment, "OMP_NUM_THREADS": "1"}))
        assert torch.get_num_threads() == 3
        torch.set_num_threads(2)
        choose_device("cpu", World({**environment, "OMP_NUM_THREADS": "2"}))  # the user has set the number
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_one_device_for_several_processes_is_refused(device):
    with pytest.raises(InputError, match="2 processes"):
        choose_device(device, World({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}))
