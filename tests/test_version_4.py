"""v4 as a user runs it on a CPU: the tier, the memory plan, and what the tests of the other versions check."""

import json
import random
import re
import shutil
import signal
import time

import pytest
import transformers
from configs import configure_v4
from helpers import (
    ROOT,
    SLOW_STEPS,
    TIME_LIMIT,
    newest_step,
    patched_script,
    result,
    run,
    small_flags,
    start,
    wait_for_checkpoint,
    wait_until,
)
from launches import finish, launch
from launches import start as start_launch
from safetensors.torch import load_file

from microbert.runtime.device import GIB
from microbert.train.checkpoint import look_for_checkpoint
from microbert.train.hardware import Hardware

pytestmark = pytest.mark.slow
V4 = ROOT / "mlm_pretrain_v4.py"
TABLE = ("weights", "optimizer's moments", "gradients", "activations", "context and margin", "total")


def flags_of(folder, **constants):
    """Return the flags of a run of seconds, with layers, width and batch of the CPU's tier."""
    flags = small_flags(folder, **{"epochs": 6, "eval_every": 10, "save_every": 4, "learning_rate": 3e-6, **constants})
    for name in {"--n-layers", "--batch-size"} - {"--" + name.replace("_", "-") for name in constants}:
        at = flags.index(name)
        del flags[at : at + 2]
    return flags


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v4")
    done = run(flags_of(folder, keep_checkpoints=100), V4)
    assert done.returncode == 0, done.stderr
    (folder / "out").write_text(done.stdout)
    return folder


def copy_text(finished, folder):
    shutil.copy(finished / "corpus.jsonl", folder)
    shutil.copytree(finished / "cache", folder / "cache")


def evaluations(folder):
    return [
        line["eval/loss"]
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "eval/loss" in line
    ]


def test_it_plans_and_trains_the_model_of_the_tier_and_transformers_loads_it(finished):
    out = (finished / "out").read_text()
    places = [out.index(f"\n  {name}") for name in TABLE]
    assert places == sorted(places) and places[-1] < out.index("model: 4 layers, 8 heads, 128-dim")
    assert "starting from the words' neighbours" in out
    assert "of 24.0" in out and 'preset "auto": 4 layers, batch 32 for each process, the tier of the CPU' in out
    model = transformers.AutoModelForMaskedLM.from_pretrained(finished / "run")
    config = model.config
    assert type(model).__name__ == "ModernBertForMaskedLM"
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (4, 8, 128)
    losses = evaluations(finished / "run")
    assert losses[-1] < losses[0]


def test_the_dry_run_prints_what_the_run_does_and_writes_nothing(finished, tmp_path):
    copy_text(finished, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = run([*flags_of(tmp_path), "--dry-run"], V4)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    plan, out = json.loads(done.stdout.splitlines()[-1]), (finished / "out").read_text()
    assert all(f"\n  {name}" in done.stdout for name in TABLE)
    assert (plan["n_layers"], plan["n_heads"], plan["n_embed"], plan["batch_size"], plan["micro_batch_size"]) == (
        4,
        8,
        128,
        32,
        32,
    )
    assert f"{plan['parameters']:,} parameters" in out and f"{plan['steps']:,} steps" in out
    table = done.stdout[done.stdout.index("peak memory of each process") : done.stdout.index("  total")]
    assert table in out  # to the last digit
    lines = [json.loads(line) for line in (finished / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = max(line.get("train/peak_memory_gb", 0) for line in lines)
    at_the_end = re.search(r"; memory: at most (\d+\.\d\d) GB$", out, re.MULTILINE)
    assert 0.1 < measured <= float(at_the_end[1]) + 0.005 and float(at_the_end[1]) < plan["planned_peak_gb"]


@pytest.mark.parametrize("gb, n_layers, batch_size", [(141, 4, 16), (80, 6, 32), (24, 4, 8)])
def test_a_plan_for_gpus_that_are_not_at_hand(gb, n_layers, batch_size, finished, tmp_path):
    copy_text(finished, tmp_path)
    done = run(
        [
            "--dataset",
            str(tmp_path / "corpus.jsonl"),
            "--output-dir",
            str(tmp_path / "run"),
            "--cache-dir",
            str(tmp_path / "cache"),
            "--dry-run",
            "--gpu-memory-gb",
            str(gb),
            "--num-gpus",
            "8",
        ],
        V4,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])
    assert (plan["n_layers"], plan["batch_size"], plan["global_batch_size"]) == (n_layers, batch_size, 8 * batch_size)
    assert (plan["n_embed"], plan["n_heads"], plan["device"], plan["planned_seconds"]) == (128, 8, "cuda", None)
    assert 1 < plan["planned_peak_gb"] < plan["memory_budget_gb"] == 24
    assert f"8 GPUs of {gb} GB (not at hand)" in done.stdout and "peak memory of each GPU" in done.stdout


def test_a_plan_for_the_large_preset_on_eight_processes(tmp_path):
    flags = flags_of(tmp_path, max_seq_len=256, vocab_size=25_000)
    done = run([*flags, "--preset", "large", "--dry-run", "--gpu-memory-gb", "24", "--num-gpus", "8"], V4)
    plan = json.loads(done.stdout.splitlines()[-1])
    names = ("n_layers", "n_embed", "max_seq_len", "vocab_size", "batch_size", "micro_batch_size", "global_batch_size")
    assert [plan[name] for name in names] == [8, 256, 256, 25_000, 96, 96, 768]
    assert 2.5 < plan["planned_peak_gb"] < plan["memory_budget_gb"] == 24  # of which 2.5 are not for tensors


def test_muons_momentum_is_in_the_checkpoint(finished):
    kinds = {
        name.split(".")[0]
        for name in load_file(next((finished / "run").glob("checkpoint-*")) / "optimizer.safetensors")
    }
    assert kinds == {"exp_avg", "exp_avg_sq", "momentum"}


def test_max_minutes_ends_the_run_in_time_also_after_a_kill(finished, tmp_path):
    copy_text(finished, tmp_path)
    minutes = 0.8
    flags = [*flags_of(tmp_path, epochs=10_000, save_every=5, eval_every=None), "--max-minutes", str(minutes)]
    process = start(flags, V4)
    wait_for_checkpoint(process, tmp_path / "run")
    process.kill()
    process.communicate()
    done = run(flags, V4)
    assert done.returncode == 0 and "resuming after step" in done.stdout, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    *lines, of_lengths = lines
    assert "by_length/loss_8" in of_lengths
    assert "eval/loss" in lines[-1] and 10 < lines[-1]["seconds"] < 60 * minutes  # including those before the kill
    rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
    assert rates[-1] < 0.3 * max(rates)  # it decayed in time
    assert (tmp_path / "run" / "README.md").exists()


@pytest.mark.fault(row=1)
def test_killed_and_stopped_runs_end_with_the_same_model(finished, tmp_path):
    copy_text(finished, tmp_path)
    flags, rng = flags_of(tmp_path), random.Random(4)
    slow = patched_script(tmp_path / "slow.py", SLOW_STEPS, V4)
    for fault, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        before = newest_step(tmp_path / "run")
        process = start(flags, slow)
        wait_until(lambda before=before: newest_step(tmp_path / "run") > before, process)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(fault)
        _, err = process.communicate(timeout=TIME_LIMIT)
        assert process.returncode == code and "Traceback" not in err, err
    assert run(flags, V4).returncode == 0
    assert result(tmp_path / "run") == result(finished / "run")


def test_two_processes_train_as_one_and_resume(finished, tmp_path):
    copy_text(finished, tmp_path)
    whole, stopped = (flags_of(tmp_path, batch_size=16, output_dir=tmp_path / name) for name in ("whole", "stopped"))
    code, out, err = launch(whole, 2, script=V4)
    assert code == 0, err
    assert evaluations(tmp_path / "whole") == pytest.approx(evaluations(finished / "run"), abs=2e-3)
    assert out.count("peak memory of each process") == 1
    process = start_launch(stopped, 2, script=V4)
    wait_for_checkpoint(process, tmp_path / "stopped")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code in (75, 0), err
    assert launch(stopped, 2, script=V4)[0] == 0
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")


def test_a_resumed_run_keeps_its_shape_and_a_new_one_has_that_of_the_device(finished, tmp_path):
    copy_text(finished, tmp_path)
    shutil.copytree(finished / "run" / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    h100 = Hardware("cuda", 80 * GIB)
    path, given, resolved = look_for_checkpoint(tmp_path / "run", configure_v4(*flags_of(tmp_path)), h100)
    assert path and (given.n_layers, given.batch_size, resolved.batch_size, resolved.global_batch_size) == (
        4,
        32,
        32,
        32,
    )
    path, given, resolved = look_for_checkpoint(tmp_path / "new", configure_v4(*flags_of(tmp_path)), h100)
    assert path is None and (given.n_layers, resolved.global_batch_size) == (6, 32)


def test_a_budget_that_is_too_small_is_rejected_at_once(finished, tmp_path):
    copy_text(finished, tmp_path)
    done = run(flags_of(tmp_path, memory_budget_gb=0.5), V4)
    assert done.returncode == 2 and "memory_budget_gb = 0.5" in done.stderr and "Traceback" not in done.stderr


def test_a_small_budget_uses_smaller_micro_batches_of_the_same_batch(finished, tmp_path):
    copy_text(finished, tmp_path)
    done = run(flags_of(tmp_path, memory_budget_gb=1.165), V4)
    assert done.returncode == 0, done.stderr
    assert "times per step" in done.stdout and "steps of 1,024 tokens" in done.stdout
    assert evaluations(tmp_path / "run") == pytest.approx(evaluations(finished / "run"), abs=2e-3)
