"""Killed, stopped, damaged: the same command comes to bitwise the run that was never disturbed."""

import json
import random
import shutil
import signal
import subprocess
import time

import pytest
from helpers import TIME_LIMIT, listing, result, run, run_here, small_flags, start

N_KILLS = 20


def wait_for_checkpoint(process, folder):
    deadline = time.monotonic() + TIME_LIMIT
    while not list(folder.glob("checkpoint-*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def corpus_from(finished_run, tmp_path):
    shutil.copy(finished_run / "corpus.jsonl", tmp_path)


@pytest.mark.slow
def test_twenty_kills_at_random_times_change_nothing(tmp_path):
    """From an empty cache, on real reviews, so that preparation takes long enough to be hit too."""

    def flags(name):
        return small_flags(tmp_path, dataset="imdb", max_samples=3000, vocab_size=2000, epochs=4, save_every=25, eval_every=500,
                           output_dir=tmp_path / name, cache_dir=tmp_path / f"{name}_cache")

    begin = time.monotonic()
    assert run(flags("whole")).returncode == 0
    longest = 0.6 * (time.monotonic() - begin)  # of one launch before its kill, so that some reach training on any machine
    rng = random.Random(2)
    where = []
    while len(where) < N_KILLS:
        process = start(flags("killed"))
        try:
            process.communicate(timeout=rng.uniform(0.1 * longest, longest))
            shutil.rmtree(tmp_path / "killed")  # it reached the end: begin again
            continue
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        where.append("training" if list((tmp_path / "killed").glob("checkpoint-*")) else "before the first checkpoint")
    assert set(where) == {"training", "before the first checkpoint"}
    assert run(flags("killed")).returncode == 0
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".checkpoint*"))


def test_resuming_from_every_checkpoint_gives_the_same_run(tmp_path, monkeypatch):
    flags = small_flags(tmp_path, save_every=1, keep_checkpoints=1000, eval_every=4, epochs=1)
    assert run_here(flags, monkeypatch) == 0
    whole = result(tmp_path / "run")
    steps = int(whole["checkpoint"][11:])
    for step in range(1, steps):
        again = tmp_path / f"from-{step}"
        again.mkdir()
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", again / f"checkpoint-{step}")
        shutil.copy(tmp_path / "run" / "metrics.jsonl", again)  # with the lines after the checkpoint, as a kill leaves it
        assert run_here([*flags, "--output-dir", str(again)], monkeypatch) == 0
        assert result(again) == whole, f"resumed at step {step}"


def test_resuming_with_dropout_and_micro_batches_gives_the_same_run(tmp_path, monkeypatch):
    flags = small_flags(tmp_path, dropout=0.1, micro_batch_size=3, epochs=1)
    assert run_here(flags, monkeypatch) == 0
    whole = result(tmp_path / "run")
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-30", again / "checkpoint-30")
    shutil.copy(tmp_path / "run" / "metrics.jsonl", again)
    assert run_here([*flags, "--output-dir", str(again)], monkeypatch) == 0
    assert result(again) == whole


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(reference, finished_run, tmp_path, monkeypatch):
    corpus_from(finished_run, tmp_path)
    assert run_here(small_flags(tmp_path), monkeypatch) == 0
    assert result(tmp_path / "run") == reference
    assert run_here(small_flags(tmp_path, seed=1, output_dir=tmp_path / "other"), monkeypatch) == 0
    assert result(tmp_path / "other")["hashes"] != reference["hashes"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(name, finished_run, reference, tmp_path):
    corpus_from(finished_run, tmp_path)
    flags = small_flags(tmp_path)
    process = start(flags)
    wait_for_checkpoint(process, tmp_path / "run")
    process.send_signal(getattr(signal, name))
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert not (tmp_path / "run" / "README.md").exists()
    assert run(flags).returncode == 0
    assert result(tmp_path / "run") == reference


def test_a_finished_run_started_again_says_so_and_changes_nothing(finished_run):
    before = listing(finished_run / "run")
    again = run(small_flags(finished_run))
    assert again.returncode == 0 and "is finished" in again.stdout
    after = listing(finished_run / "run")
    before.pop("status.json"), after.pop("status.json")  # it tells of the launch, not of the run
    assert after == before


def test_overwrite_starts_anew(finished_run, reference, tmp_path, monkeypatch):
    shutil.copytree(finished_run, tmp_path / "copy")
    flags = small_flags(tmp_path / "copy", n_layers=2)
    assert run_here([*flags, "--overwrite"], monkeypatch) == 0
    assert result(tmp_path / "copy" / "run")["hashes"] != reference["hashes"]


def interrupted_copy(finished_run, tmp_path):
    """The reference as a kill before the last steps would have left it, with two checkpoints."""
    folder = tmp_path / "copy"
    shutil.copytree(finished_run, folder)
    for name in ("README.md", "model.safetensors", "config.json"):
        (folder / "run" / name).unlink()
    return folder


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        del data[len(data) // 2 :]
    elif kind == "zeroed":
        data[:] = bytes(len(data))
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["truncated", "zeroed", "bit-flipped"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(kind, file, finished_run, reference, tmp_path, monkeypatch, capfd):
    folder = interrupted_copy(finished_run, tmp_path)
    damage(folder / "run" / reference["checkpoint"] / file, kind)
    assert run_here(small_flags(folder), monkeypatch) == 0
    assert "damaged" in capfd.readouterr().err
    assert result(folder / "run") == reference


def test_with_every_checkpoint_damaged_the_run_refuses_to_start_over(finished_run, tmp_path, monkeypatch, capfd):
    folder = interrupted_copy(finished_run, tmp_path)
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        damage(checkpoint / "model.safetensors", "truncated")
    before = listing(folder / "run")
    assert run_here(small_flags(folder), monkeypatch) == 2
    assert "--overwrite" in capfd.readouterr().err
    after = listing(folder / "run")
    before.pop("status.json"), after.pop("status.json")
    assert after == before


def test_other_constants_are_refused_by_name(finished_run, tmp_path, monkeypatch, capfd):
    folder = interrupted_copy(finished_run, tmp_path)
    assert run_here([*small_flags(folder), "--n-layers", "2", "--epochs", "5"], monkeypatch) == 2
    errors = capfd.readouterr().err
    assert "n_layers = 2 (was 1)" in errors and "epochs = 5 (was 2)" in errors


def test_a_changed_dataset_is_refused(finished_run, tmp_path, monkeypatch, capfd):
    folder = interrupted_copy(finished_run, tmp_path)
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"text": "one more document"}\n')
    assert run_here(small_flags(folder), monkeypatch) == 2
    assert "other tokens" in capfd.readouterr().err


def test_a_second_run_in_the_folder_is_refused_and_the_first_is_named(tmp_path):
    flags = small_flags(tmp_path, epochs=200)
    first = start(flags)
    try:
        wait_for_checkpoint(first, tmp_path / "run")
        second = run(flags)
        assert second.returncode == 2 and f"process {first.pid}" in second.stderr
    finally:
        first.kill()
        first.communicate()
    third = start(flags)
    try:
        deadline = time.monotonic() + TIME_LIMIT
        while f'"pid": {third.pid}' not in (tmp_path / "run" / "status.json").read_text():
            assert third.poll() is None, "after the kill of the first, the next must start"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        third.kill()
        third.communicate()


@pytest.mark.parametrize("learning_rate", ["1e20", "1e38"])
def test_numbers_that_break_down_stop_the_run_before_the_step_is_applied(learning_rate, tmp_path, monkeypatch, capfd):
    flags = [*small_flags(tmp_path, save_every=1), "--lr", learning_rate, "--lr-scaling", "none", "--warmup-ratio", "0"]
    assert run_here(flags, monkeypatch) == 1
    errors = capfd.readouterr().err
    assert "not applied" in errors and "Traceback" not in errors
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 1
