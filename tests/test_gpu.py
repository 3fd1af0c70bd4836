"""Tests that need a CUDA GPU: cap, bf16, compilation, CUDA graphs, NCCL, and steps that do not wait for the device."""

import gc
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from configs import configure, configure_v4
from helpers import ROOT, TIME_LIMIT, run, small_flags
from launches import launch
from models import VOCAB_SIZE, as_batch, noisy_model, token_rows

from microbert.data.masking import mask_batch
from microbert.model.build import build_model, shape_of
from microbert.model.health import largest_attention_logit
from microbert.model.loss import masked_scores
from microbert.runtime.device import compute_dtype, is_compiled
from microbert.runtime.distributed import World
from microbert.train.by_length import HeldOutText, loss_by_length, thorough
from microbert.train.hardware import GB, GPU_CONTEXT_GB, hardware_of
from microbert.train.memory import MARGIN, plan_memory
from microbert.train.step import Learner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
V4 = ROOT / "mlm_pretrain_v4.py"
CUDA = torch.device("cuda", 0)
WORKSPACES = 0.15 * GB  # of cuBLAS; on an H100 the peak was 0.01 and 0.13 GB above the plan


def masked_rows(n=8, max_seq_len=64, seed=0):
    return mask_batch(
        as_batch(token_rows(n, max_seq_len, seed=seed)), seed=seed, probability=0.15, vocab_size=VOCAB_SIZE
    )


def new_learner(device=CUDA, vocab_size=VOCAB_SIZE, **constants):
    config = configure(**{"n_layers": 2, "n_heads": 4, "n_embed": 64, "max_seq_len": 64, "batch_size": 8, **constants})
    return Learner(build_model(shape_of(config, vocab_size), 0).to(device), config, World.alone())


def test_a_step_matches_the_cpu():
    ours, cpus = (new_learner(device).step(masked_rows(), 0, 1e-3).read() for device in (CUDA, torch.device("cpu")))
    assert ours == pytest.approx(cpus, rel=1e-3)


def test_the_loss_by_length_and_the_attention_logit_are_those_of_the_cpu():
    rows = token_rows(20, 512, shortest=510)[:, 1:-1].astype("uint16")
    text = HeldOutText(rows, np.ones(VOCAB_SIZE, np.int64), lambda loss: loss)
    found, logits = [], []
    for device in (CUDA, torch.device("cpu")):
        model = noisy_model(max_seq_len=512, arch="modern").to(device)
        found.append([one.loss for one in loss_by_length(model, text, thorough(20), 0, 65_536).scores])
        logits.append(largest_attention_logit(model, torch.from_numpy(rows[:, :100].astype("int64")).to(device)))
    assert len(found[0]) == 7 and found[0] == pytest.approx(found[1], rel=1e-3)
    assert logits[0] == pytest.approx(logits[1], rel=1e-3)


def test_bf16_is_chosen_if_the_gpu_has_it_and_a_step_is_about_the_same():
    chosen = compute_dtype(configure_v4(), CUDA)
    assert chosen == (torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32)
    exact, narrow = (new_learner(dtype=dtype).step(masked_rows(), 0, 1e-3).read() for dtype in ("float32", "bfloat16"))
    assert narrow == pytest.approx(exact, rel=0.02)


def test_compilation_is_chosen_and_a_step_is_the_same():
    assert is_compiled(configure_v4(), CUDA) and not is_compiled(configure(), CUDA)
    eager, compiled = new_learner(), new_learner(torch_compile=True)
    for number in range(3):
        assert compiled.step(masked_rows(), number, 1e-3).read() == pytest.approx(
            eager.step(masked_rows(), number, 1e-3).read(), rel=1e-3
        )


@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"dropout": 0.1, "micro_batch_size": 3, "packing": False},
        {"dtype": "bfloat16", "torch_compile": True},
        {"arch": "modern", "optimizer": "muon", "dtype": "bfloat16", "torch_compile": True},
    ],
)
def test_replayed_steps_are_the_same(constants, capsys):
    plain, captured = new_learner(cuda_graphs=False, **constants), new_learner(**constants)
    for number in range(10):
        masked, rate = masked_rows(8 if number != 5 else 7, seed=number), (number + 1) * 2e-4
        assert captured.step(masked, number, rate).read() == pytest.approx(
            plain.step(masked, number, rate).read(), rel=5e-3
        )
    assert captured._backward.has_graph and captured._update.has_graph and not capsys.readouterr().err
    for parameter, other in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("torch_compile", [False, True])
def test_rows_of_several_lengths_are_replayed_with_the_same_result(torch_compile):
    constants = {"rows": "documents", "packing": True, "arch": "modern", "global_batch_size": 8}
    plain = new_learner(cuda_graphs=False, **constants)
    learner = new_learner(torch_compile=torch_compile, **constants)
    kinds = [(64, 8), (16, 32), (8, 64), (1, 512)]  # rows and tokens of a row; in turn full and padded
    for number in range(8 * len(kinds)):
        n_rows, length = kinds[number % len(kinds)]
        shortest = 1 if number // len(kinds) % 2 else length - 2
        rows = as_batch(token_rows(n_rows, length, seed=number, shortest=shortest))
        masked = mask_batch(rows, seed=number, probability=0.15, vocab_size=VOCAB_SIZE)
        numbers = [one.step(masked, number, 1e-3).read() for one in (plain, learner)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-2)
    assert learner._backward.has_graph and learner._update.has_graph


@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"dtype": "bfloat16", "torch_compile": True, "dropout": 0.1},
        {"micro_batch_size": 20, "dropout": 0.1},
        {"arch": "modern", "optimizer": "muon", "dtype": "bfloat16", "torch_compile": True},
    ],
)
def test_no_step_waits_for_the_device(constants):
    learner, masked = new_learner(batch_size=96, **constants), masked_rows(96)
    steps = [learner.step(masked, number, 1e-3) for number in range(3)]  # the first ones initialise libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps += [learner.step(masked, number, 1e-3) for number in range(3, 6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    losses = [step.read()[0] for step in steps]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "constants",
    [{}, {"cuda_graphs": False}, {"arch": "modern", "optimizer": "muon", "dtype": "bfloat16", "torch_compile": True}],
)
def test_memory_stays_within_the_plan(constants):
    """Of tensors, and cuBLAS's workspaces. The plan counts what the allocator rounds up as a margin."""
    config = configure(
        **{"n_layers": 8, "n_heads": 8, "n_embed": 256, "max_seq_len": 256, "batch_size": 96, **constants}
    )
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    learner, masked = (
        Learner(build_model(shape_of(config, 25_000), 0).to(CUDA), config, World.alone()),
        masked_rows(96, 256),
    )
    for number in range(4):
        learner.step(masked, number, 1e-3).read()
    with torch.no_grad():
        masked_scores(*learner.hidden(masked))
    plan = plan_memory(config, 25_000, hardware_of(CUDA, World.alone()))
    tensors = plan.total - plan.parts[MARGIN]
    assert 0.5 * tensors < torch.cuda.max_memory_allocated() - before < tensors + WORKSPACES


CAPPED = """import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from test_gpu import CUDA, masked_rows, new_learner
from configs import configure
from microbert.runtime.device import peak_memory_gb
from microbert.train.hardware import Hardware
from microbert.train.memory import cap_memory
cap_memory(configure(memory_budget_gb={budget_gb}), Hardware("cuda", None), CUDA)
learner = new_learner(n_layers=8, n_heads=8, n_embed=256, max_seq_len=256, batch_size=96)
for number in range(3):
    learner.step(masked_rows(96, 256), number, 1e-3).read()
print(learner.sizes.micro_batch, learner.sizes.ran_short, peak_memory_gb(CUDA))
"""


def test_under_a_cap_the_micro_batch_is_halved_until_it_fits():
    budget_gb = 2.0
    program = CAPPED.format(root=str(ROOT), tests=str(ROOT / "tests"), budget_gb=budget_gb)
    # as the driver counts it, with the context of the other process; nothing else may use the GPU meanwhile
    free = [torch.cuda.mem_get_info(CUDA)[0]]
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + TIME_LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        free.append(torch.cuda.mem_get_info(CUDA)[0])
        time.sleep(0.002)
    process.kill()
    out, err = process.communicate()
    assert process.returncode == 0, err
    size, ran_short, peak = out.split()
    assert int(size) < 96 and ran_short == "True" and float(peak) <= budget_gb - GPU_CONTEXT_GB
    assert float(peak) / 2 < (free[0] - min(free)) / GB <= budget_gb


def flags_of(folder, **constants):
    return small_flags(folder, **{"device": "cuda", "n_layers": 2, "epochs": 4, "torch_compile": False, **constants})


def evaluations(folder):
    return [
        line["eval/loss"]
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "eval/loss" in line
    ]


def test_v4_trains_and_resumes_after_a_kill_on_a_gpu(tmp_path):
    flags = flags_of(tmp_path, keep_checkpoints=100)
    done = run(flags, V4)
    assert done.returncode == 0, done.stderr
    assert "memory of the GPU" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < max(line.get("train/peak_memory_gb", 0) for line in lines) < 23
    expected = evaluations(tmp_path / "run")
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    os.rename(newest, tmp_path / "away")
    (tmp_path / "run" / "README.md").unlink()
    done = run(flags, V4)
    assert done.returncode == 0 and "resuming after step" in done.stdout, done.stderr
    # not bitwise: attention on a GPU adds in no fixed order
    assert evaluations(tmp_path / "run") == pytest.approx(expected, abs=0.02)


def test_v4_compiles_its_model_by_default_and_learns(tmp_path):
    done = run(flags_of(tmp_path, torch_compile=None), V4)
    assert done.returncode == 0, done.stderr
    assert ", compiled, " in done.stdout
    losses = evaluations(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_over_nccl(tmp_path):
    losses = []
    for n in (1, 2):
        code, _, err = launch(flags_of(tmp_path, batch_size=8 // n, output_dir=tmp_path / str(n)), n, script=V4)
        assert code == 0, err
        losses.append(evaluations(tmp_path / str(n)))
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
