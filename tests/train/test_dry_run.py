"""--dry-run prints what the run would do, exits as it would, and writes nothing."""

import collections
import json
import shutil
import time
import types

import pytest
from helpers import run, run_here, small_flags

import microbert.train.dry_run


@pytest.fixture
def dry(monkeypatch, capfd, tmp_path):
    """Print the plan of the flags. Return its exit code, output, errors and last line.

    Fails if a file or folder changes.
    """

    def plan(folder, flags):
        before = everything(folder)
        capfd.readouterr()
        code = run_here([*flags, "--dry-run"], monkeypatch)
        out, err = capfd.readouterr()
        assert everything(folder) == before
        assert "Traceback" not in err
        return types.SimpleNamespace(
            code=code, out=out, err=err, plan=json.loads(out.splitlines()[-1]) if code == 0 else None
        )

    return plan


def everything(folder):
    """Return every path below, including folders, with size and time of modification."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns, path.is_dir())
        for path in folder.rglob("*")
    }


@pytest.fixture
def copy(finished_run, tmp_path):
    """Return a copy of the finished run."""
    shutil.copytree(finished_run, tmp_path / "copy")
    return tmp_path / "copy"


def interrupt(folder):
    (folder / "run" / "README.md").unlink()


def newest(folder):
    return max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))


def test_before_preparation_it_prints_the_whole_plan_and_writes_nothing(tmp_path, tmp_path_factory):
    """In a separate process, with an empty HF_HOME and an empty home."""
    import os

    home = tmp_path / "home"
    home.mkdir()
    flags = small_flags(tmp_path)
    before = everything(tmp_path)
    # with a cache elsewhere for compiled kernels, which the measured steps use
    env = {
        **os.environ,
        "HF_HOME": str(home),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }
    done = run([*flags, "--dry-run"], cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    assert everything(tmp_path) == before
    assert "to be prepared from" in done.stdout and "twice that during preparation" in done.stdout
    assert str(tmp_path / "cache") in done.stdout and str(tmp_path / "run") in done.stdout
    plan = json.loads(done.stdout.splitlines()[-1])
    assert {
        "n_layers": 1,
        "n_heads": 2,
        "n_embed": 4,
        "max_seq_len": 32,
        "vocab_size": 300,
        "batch_size": 8,
        "micro_batch_size": 8,
        "steps_done": 0,
        "tokens_known": False,
    }.items() <= plan.items()
    assert plan["peak_learning_rate"] == pytest.approx(5e-5 * 128 * (768 / 4) ** 0.25 * (8 * 32 / 4096) ** 0.5)
    assert 0 < plan["planned_peak_gb"] < 2 and plan["planned_seconds"] > 0


def test_the_steps_are_estimated_before_preparation_and_exact_after_it(dry, copy, reference):
    flags = small_flags(copy)
    steps = int(reference["checkpoint"][11:])
    shutil.rmtree(copy / "run")
    after = dry(copy, flags)
    assert after.plan["tokens_known"] and after.plan["steps"] == steps and "nothing more in" in after.out
    shutil.rmtree(copy / "cache")
    before = dry(copy, flags)
    assert not before.plan["tokens_known"] and before.plan["steps"] == pytest.approx(steps, rel=0.1)


def test_a_finished_run_has_no_steps_left(dry, copy, reference):
    outcome = dry(copy, small_flags(copy))
    steps = int(reference["checkpoint"][11:])
    assert outcome.code == 0 and "is finished" in outcome.out and "training:" not in outcome.out
    assert (outcome.plan["steps"], outcome.plan["steps_done"], outcome.plan["planned_seconds"]) == (steps, steps, 0)
    overwritten = dry(copy, [*small_flags(copy), "--overwrite"])
    assert (
        "removes the earlier run" in overwritten.out
        and overwritten.plan["steps_done"] == 0
        and overwritten.plan["steps"] == steps
    )


@pytest.mark.parametrize("is_prepared", [True, False])
def test_a_run_with_a_checkpoint_would_resume_from_it(is_prepared, dry, copy, reference):
    steps = int(reference["checkpoint"][11:])
    interrupt(copy)
    shutil.rmtree(newest(copy))
    done = int(newest(copy).name[11:])
    (copy / "run" / ".checkpoint.tmp").mkdir()  # left by a kill during a save
    if not is_prepared:
        shutil.rmtree(copy / "cache")
    outcome = dry(copy, small_flags(copy))
    assert outcome.plan["steps_done"] == done
    assert f"resuming after step {done}: " in outcome.out and str(newest(copy)) in outcome.out
    if is_prepared:
        assert outcome.plan["steps"] == steps and f": {steps - done} steps remain" in outcome.out


def test_a_damaged_checkpoint_is_skipped_and_kept(dry, copy):
    interrupt(copy)
    bad = newest(copy)
    (bad / "model.safetensors").write_bytes(b"")
    outcome = dry(copy, small_flags(copy))
    assert "damaged" in outcome.err and bad.exists()
    assert 0 < outcome.plan["steps_done"] < int(bad.name[11:])
    for checkpoint in (copy / "run").glob("checkpoint-*"):
        (checkpoint / "model.safetensors").write_bytes(b"")
    outcome = dry(copy, small_flags(copy))
    assert outcome.code == 2 and "--overwrite" in outcome.err


@pytest.mark.parametrize("is_finished", [True, False])
def test_changed_constants_are_rejected_as_by_the_run(is_finished, dry, copy, monkeypatch, capfd):
    if not is_finished:
        interrupt(copy)
    flags = small_flags(copy, n_layers=2, epochs=5)
    outcome = dry(copy, flags)
    assert outcome.code == 2 and "n_layers = 2 (was 1)" in outcome.err and "epochs = 5 (was 2)" in outcome.err
    assert run_here(flags, monkeypatch) == 2
    assert capfd.readouterr().err == outcome.err


def test_tokens_that_differ_from_the_checkpoint_are_rejected(dry, copy, monkeypatch, capfd):
    interrupt(copy)
    with open(copy / "corpus.jsonl", "a") as file:
        file.write('{"text": "one more document"}\n')
    assert run_here(small_flags(copy, output_dir=copy / "other", prepare_only=True), monkeypatch) == 0
    outcome = dry(copy, small_flags(copy))
    assert outcome.code == 2 and "other tokens" in outcome.err


def test_a_folder_with_other_files_is_rejected(dry, tmp_path):
    flags = small_flags(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("")
    outcome = dry(tmp_path, flags)
    assert outcome.code == 2 and "holds other files" in outcome.err
    outcome = dry(tmp_path, small_flags(tmp_path, output_dir=tmp_path / "corpus.jsonl"))
    assert outcome.code == 2 and "not a folder" in outcome.err


def test_a_locked_folder_can_be_planned(dry, copy):
    import filelock

    interrupt(copy)
    with filelock.FileLock(copy / "run" / ".lock"):
        assert dry(copy, small_flags(copy)).code == 0


@pytest.mark.parametrize("full", ["cache", "run"])
def test_a_full_disk_of_either_folder_is_a_warning(full, dry, tmp_path, monkeypatch):
    flags = small_flags(tmp_path)
    for name in ("cache", "run"):
        (tmp_path / name).mkdir()
    assert "may be too small" not in dry(tmp_path, flags).out
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(
        microbert.train.dry_run.shutil, "disk_usage", lambda path: usage(10 if path.name == full else 10**12)
    )
    assert "may be too small" in dry(tmp_path, flags).out


@pytest.mark.slow
@pytest.mark.parametrize("recorded, n_slow", [(False, 1), (True, 3)])
def test_steps_that_compile_and_capture_are_not_timed(recorded, n_slow, dry, tmp_path, monkeypatch):
    real, calls = microbert.train.dry_run.Learner.step, []

    def step(self, *arguments):
        calls.append(None)
        time.sleep(6 if len(calls) == 1 else 1 if len(calls) <= n_slow else 0)
        return real(self, *arguments)

    monkeypatch.setattr(microbert.train.dry_run, "is_captured", lambda *_: recorded)
    monkeypatch.setattr(microbert.train.dry_run.Learner, "step", step)
    plan = dry(tmp_path, small_flags(tmp_path)).plan
    assert len(calls) > n_slow + 1 and plan["planned_seconds"] < 0.5 * plan["steps"]
