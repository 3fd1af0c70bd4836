"""Killed, stopped, damaged: the same command comes to bitwise the run that was never disturbed."""

import contextlib
import errno
import json
import multiprocessing
import random
import runpy
import shutil
import signal
import sys
import time

import pytest
import torch
from helpers import SCRIPT, TIME_LIMIT, listing, result, run, run_here, small_flags, start, wait_for_checkpoint, wait_until
from test_config import configure

from microbert.config import InputError
from microbert.run import open_run

KILLS_A_SERIES = 5
# processes that have their libraries loaded when they begin, so that kills at random times fall on what the run does
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["matplotlib.figure", "pyarrow", "tokenizers", "torch._dynamo", "transformers.models.bert.modeling_bert"])


def run_script(flags, log):
    sys.argv = [str(SCRIPT), *flags]
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def corpus_from(finished_run, tmp_path):
    shutil.copy(finished_run / "corpus.jsonl", tmp_path)


@pytest.mark.slow
def test_ten_kills_at_random_times_change_nothing(tmp_path):
    """In series from an empty cache, on real reviews: the first kill of each falls before the first checkpoint, the others anywhere."""

    def flags(name):
        return small_flags(tmp_path, dataset="imdb", max_samples=1200, vocab_size=1000, epochs=2, save_every=20, eval_every=200,
                           output_dir=tmp_path / name, cache_dir=tmp_path / f"{name}_cache")

    def newest_step(folder):
        return max((int(path.name[11:]) for path in folder.glob("checkpoint-*")), default=0)

    def launch(name):
        process = FORKS.Process(target=run_script, args=(flags(name), tmp_path / "log"))
        process.start()
        return process

    def end(process):
        process.join(TIME_LIMIT)
        assert process.exitcode == 0, (tmp_path / "log").read_text()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = launch("whole")
    begin = time.monotonic()
    while process.is_alive() and not any(whole.glob("checkpoint-*")):
        time.sleep(0.005)
    until_checkpoint = time.monotonic() - begin
    end(process)

    rng = random.Random(2)
    where = []
    for share in (0.4, 1.0):  # of the time to the first checkpoint: in the first, also a machine that has become faster is killed before it
        shutil.rmtree(killed, ignore_errors=True)
        shutil.rmtree(tmp_path / "killed_cache", ignore_errors=True)
        kills = 0
        while kills < KILLS_A_SERIES:
            wanted = newest_step(killed) + (20 * rng.randint(0, 3) if kills else 0)
            process = launch("killed")
            while process.is_alive() and newest_step(killed) < wanted:
                time.sleep(0.005)
            process.join(rng.uniform(0, share * until_checkpoint))
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                where.append("training" if newest_step(killed) else "before the first checkpoint")
                continue
            end(process)
            assert result(killed) == result(whole)
            shutil.rmtree(killed)  # it reached the end before its kill: that one is still to come
            if not kills:
                shutil.rmtree(tmp_path / "killed_cache")
                until_checkpoint *= 0.7  # the machine is faster than when it was measured
        end(launch("killed"))
        assert result(killed) == result(whole)
        assert not list(killed.glob(".checkpoint*"))
    assert set(where) == {"training", "before the first checkpoint"}


def test_resuming_from_every_checkpoint_gives_the_same_run(tmp_path, monkeypatch):
    flags = small_flags(tmp_path, max_samples=160, save_every=1, keep_checkpoints=1000, eval_every=4, epochs=1)
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


@pytest.fixture(params=[1, 2])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_resuming_with_dropout_and_micro_batches_gives_the_same_run(n_threads, tmp_path, monkeypatch):
    flags = small_flags(tmp_path, max_samples=120, dropout=0.1, micro_batch_size=3, save_every=5, epochs=1)
    assert run_here(flags, monkeypatch) == 0
    whole = result(tmp_path / "run")
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-10", again / "checkpoint-10")
    shutil.copy(tmp_path / "run" / "metrics.jsonl", again)
    assert run_here([*flags, "--output-dir", str(again)], monkeypatch) == 0
    assert result(again) == whole


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(reference, finished_run, tmp_path, monkeypatch):
    corpus_from(finished_run, tmp_path)
    assert run_here(small_flags(tmp_path), monkeypatch) == 0
    assert result(tmp_path / "run") == reference
    assert run_here(small_flags(tmp_path, seed=1, output_dir=tmp_path / "other"), monkeypatch) == 0
    assert result(tmp_path / "other")["hashes"] != reference["hashes"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
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
        wait_until(lambda: f'"pid": {third.pid}' in (tmp_path / "run" / "status.json").read_text(), third)
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


@pytest.mark.parametrize("largest_file", [2_000, 60_000])  # bytes: less than the tokenizer takes; less than the training curve, and more than the kernel of attention
def test_a_file_that_cannot_grow_is_told_and_the_same_command_goes_on(largest_file, finished_run, reference, tmp_path):
    import resource

    corpus_from(finished_run, tmp_path)
    flags = small_flags(tmp_path)
    full = run(flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file)))
    assert full.returncode == 1
    assert "ulimit -f" in full.stderr and "the same command goes on" in full.stderr and "Traceback" not in full.stderr
    assert str(tmp_path / "run") in full.stderr and str(tmp_path / "cache") in full.stderr
    assert bool(list((tmp_path / "run").glob("checkpoint-*"))) == (largest_file > 2_000)
    assert run(flags).returncode == 0
    assert result(tmp_path / "run") == reference


def caused(full):
    raise RuntimeError("could not write") from full


def hidden(full):
    try:
        caused(full)
    except RuntimeError:
        raise InputError("the dataset cannot be read") from None


def as_it_is(full):
    raise full


@pytest.mark.parametrize("number, filename", [(errno.ENOSPC, None), (errno.EDQUOT, None), (errno.ENOSPC, "/mnt/shard.npy")])
@pytest.mark.parametrize("raise_it", [as_it_is, caused, hidden])
def test_a_full_disk_is_told_with_the_places_to_look_at(raise_it, number, filename, finished_run, tmp_path, monkeypatch, capfd):
    import microbert.prepare

    corpus_from(finished_run, tmp_path)

    def prepare_tokens(*arguments):
        raise_it(OSError(number, "full", filename) if filename else OSError(number, "full"))

    monkeypatch.setattr(microbert.prepare, "prepare_tokens", prepare_tokens)
    assert run_here(small_flags(tmp_path), monkeypatch) == 1
    errors = capfd.readouterr().err
    places = [filename] if filename else [str(tmp_path / "run"), str(tmp_path / "cache")]
    assert f"the disk is full ({' or '.join(places)})" in errors and "Traceback" not in errors
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)


def test_for_a_dataset_of_the_hub_its_downloads_are_a_place_too(tmp_path, capfd):
    from huggingface_hub.constants import HF_HOME

    config = configure(dataset="org/name", output_dir=str(tmp_path / "run"))
    with pytest.raises(SystemExit) as stop, open_run(config):
        raise OSError(errno.ENOSPC, "full")
    assert stop.value.code == 1
    assert f"or {HF_HOME})" in capfd.readouterr().err


def test_another_error_stays_a_bug_with_its_traceback(finished_run, tmp_path, monkeypatch, capfd):
    import microbert.prepare

    corpus_from(finished_run, tmp_path)
    monkeypatch.setattr(microbert.prepare, "prepare_tokens", lambda *_: as_it_is(OSError(errno.EIO, "broken")))
    assert run_here(small_flags(tmp_path), monkeypatch) == 1
    errors = capfd.readouterr().err
    assert "Traceback" in errors and "disk is full" not in errors
