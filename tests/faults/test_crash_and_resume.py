"""After a kill, a stop or damage, the same command ends with bitwise the same run as an uninterrupted one."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import threading
import time

import pytest
import torch
from crashes import (
    beginning_of,
    copy_during_second_save,
    damage,
    die_in_micro_batch,
    files_of,
    plant_incomplete_folders_and_die,
    stop_in_second_save,
    without_kernels,
)
from helpers import (
    SLOW_STEPS,
    TIME_LIMIT,
    corpus_from,
    end_of,
    fork,
    interrupted_copy,
    listing,
    newest_step,
    patched_script,
    result,
    run,
    run_here,
    small_flags,
    start,
    wait_for_checkpoint,
    wait_until,
    write_corpus,
)

import microbert.data.prepare
import microbert.train.checkpoint
import microbert.train.held_out
from microbert.train.checkpoint import verify

KILLS_PER_SERIES = 10


@pytest.mark.slow
@pytest.mark.fault(row=1)
def test_twenty_kills_at_random_times_change_nothing(tmp_path):
    """Two series on real reviews. The first kill of each is before the first checkpoint, the others anywhere."""

    def flags(name):
        return small_flags(
            tmp_path,
            dataset="imdb",
            max_samples=1200,
            vocab_size=1000,
            epochs=2,
            save_every=20,
            eval_every=200,
            output_dir=tmp_path / name,
            cache_dir=tmp_path / f"{name}_cache",
        )

    def launch(name):
        return fork(flags(name), tmp_path / "log")

    def end(process):
        assert end_of(process) == 0, (tmp_path / "log").read_text()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process, until_checkpoint = beginning_of(flags("whole"), tmp_path / "log")
    end(process)

    rng = random.Random(2)
    where = []
    for share in (0.4, 1.0):  # of the time to the first checkpoint; at 0.4, even a faster machine is killed before it
        shutil.rmtree(killed, ignore_errors=True)
        shutil.rmtree(tmp_path / "killed_cache", ignore_errors=True)
        kills = 0
        while kills < KILLS_PER_SERIES:
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
            shutil.rmtree(killed)  # the run ended before its kill, so that is still due
            if not kills:
                shutil.rmtree(tmp_path / "killed_cache")
                until_checkpoint *= 0.7  # the machine is faster than before
        end(launch("killed"))
        assert result(killed) == result(whole)
        assert not list(killed.glob(".checkpoint*"))
    assert set(where) == {"training", "before the first checkpoint"}


@pytest.mark.fault(row=3)
@pytest.mark.slow
def test_resuming_from_every_checkpoint_gives_the_same_run(tmp_path, monkeypatch):
    flags = small_flags(tmp_path, max_samples=80, save_every=1, keep_checkpoints=1000, eval_every=4, epochs=2)
    assert run_here(flags, monkeypatch) == 0
    whole = result(tmp_path / "run")
    steps = int(whole["checkpoint"][11:])
    for step in range(1, steps):
        again = tmp_path / f"from-{step}"
        again.mkdir()
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", again / f"checkpoint-{step}")
        shutil.copy(tmp_path / "run" / "metrics.jsonl", again)  # with lines after the checkpoint, as after a kill
        assert run_here([*flags, "--output-dir", str(again)], monkeypatch) == 0
        assert result(again) == whole, f"resumed at step {step}"


@pytest.fixture(params=[1, 2])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.fault(row=3)
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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.fault(row=4)
@pytest.mark.slow
def test_a_signal_saves_and_exits_75_and_the_same_command_resumes(name, finished_run, reference, tmp_path):
    corpus_from(finished_run, tmp_path)
    flags = small_flags(tmp_path)
    process = start(flags, patched_script(tmp_path / "slow.py", SLOW_STEPS))
    wait_for_checkpoint(process, tmp_path / "run")
    process.send_signal(getattr(signal, name))
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors and errors.count("stopping at the next safe point") == 1
    irregular = [path for path in (tmp_path / "run").glob("checkpoint-*") if int(path.name[11:]) % 10]
    assert len(irregular) <= 1  # one save for two signals
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert not (tmp_path / "run" / "README.md").exists()
    assert run(flags).returncode == 0
    assert result(tmp_path / "run") == reference


@pytest.mark.slow
def test_a_script_that_is_not_in_the_main_thread_trains_without_handling_signals(
    finished_run, reference, tmp_path, monkeypatch
):
    """As in a server or a notebook."""
    corpus_from(finished_run, tmp_path)
    before, codes = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: codes.append(run_here(small_flags(tmp_path), monkeypatch)))
    thread.start()
    thread.join(TIME_LIMIT)
    assert codes == [0] and signal.getsignal(signal.SIGTERM) == before
    assert result(tmp_path / "run") == reference


@pytest.mark.fault(row=6)
@pytest.mark.slow
def test_a_stop_during_preparation_exits_with_75_and_the_same_command_resumes(tmp_path, monkeypatch, capfd):
    write_corpus(tmp_path / "corpus.jsonl", n_documents=1200)
    monkeypatch.setattr(microbert.data.prepare, "BLOCK_ROWS", 200)
    written = []

    def write_block(*arguments):
        block = real(*arguments)
        written.append(block.rows)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return block

    real = microbert.data.prepare.write_block
    monkeypatch.setattr(microbert.data.prepare, "write_block", write_block)
    assert run_here(small_flags(tmp_path), monkeypatch) == 75
    stopped = capfd.readouterr()
    assert "SIGTERM" in stopped.err and "Traceback" not in stopped.err
    assert "preparing" in stopped.out and "training:" not in stopped.out
    n_before, (tokens,) = len(written), tmp_path.glob("cache/*/tokens-*")
    assert (
        2 <= n_before < 6
        and len(list(tokens.glob("block-*.json"))) == n_before
        and not (tokens / "manifest.json").exists()
    )

    assert run_here(small_flags(tmp_path), monkeypatch) == 0
    assert f"resuming after {200 * n_before:,} rows" in capfd.readouterr().out
    assert written == [200] * 6  # no block twice
    assert (
        run_here(small_flags(tmp_path, output_dir=tmp_path / "whole", cache_dir=tmp_path / "other_cache"), monkeypatch)
        == 0
    )
    assert result(tmp_path / "run") == result(tmp_path / "whole")


@pytest.mark.fault(row=6)
def test_a_stop_during_evaluation_repeats_it_after_the_restart(tmp_path, monkeypatch, reference, finished_run):
    corpus_from(finished_run, tmp_path)
    real = microbert.train.held_out.masked_scores
    calls = 0

    def scores(*arguments):
        nonlocal calls
        calls += 1
        if calls == 6:  # in the middle of the second evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(microbert.train.held_out, "masked_scores", scores)
    assert run_here(small_flags(tmp_path), monkeypatch) == 75
    monkeypatch.undo()
    assert run_here(small_flags(tmp_path), monkeypatch) == 0
    assert result(tmp_path / "run") == reference


@pytest.mark.fault(row=7)
def test_a_finished_run_started_again_says_so_and_changes_nothing(finished_run):
    before = files_of(finished_run)
    again = run(small_flags(finished_run))
    assert again.returncode == 0 and "is finished" in again.stdout
    assert files_of(finished_run) == before


@pytest.mark.slow
@pytest.mark.fault(row=2)
def test_a_kill_at_every_point_inside_a_save_changes_nothing(tmp_path):
    # the second save is the last
    flags = small_flags(tmp_path, epochs=1, max_samples=180, save_every=15, eval_every=1000, keep_checkpoints=1)
    assert end_of(fork(flags, tmp_path / "log", copy_during_second_save, tmp_path / "copies")) == 0
    whole, copies = result(tmp_path / "run"), sorted((tmp_path / "copies").iterdir())
    points = {copy.name.partition(" ")[2] for copy in copies}
    assert points == {"half a write", "fsync", "replace", "rename", "unlink", "rmdir"}
    before = None
    for copy in copies:
        if (files := listing(copy)) == before:
            continue  # nothing has changed since the point before
        before = files
        left = [path for path in copy.glob("checkpoint-*") if (path / "manifest.json").exists()]
        assert left, copy.name
        verify(max(left, key=lambda path: int(path.name[11:])))
        code = end_of(fork([*flags, "--output-dir", str(copy)], tmp_path / "log", without_kernels))
        assert code == 0, (copy.name, (tmp_path / "log").read_text())
        assert result(copy) == whole, copy.name
        assert not [path for path in copy.rglob("*") if path.name.endswith(".tmp")], copy.name
        assert len(list(copy.glob("checkpoint-*"))) == 1, copy.name


@pytest.mark.slow
@pytest.mark.fault(row=3)
def test_a_kill_between_the_micro_batches_of_a_step_changes_nothing(tmp_path):
    flags = small_flags(tmp_path, max_samples=120, micro_batch_size=3, save_every=5, epochs=2)
    assert end_of(fork([*flags, "--output-dir", str(tmp_path / "whole")], tmp_path / "log")) == 0, (
        tmp_path / "log"
    ).read_text()
    in_step_8 = 3 * 8 + 2  # of three micro-batches per step
    assert end_of(fork(flags, tmp_path / "log", die_in_micro_batch, in_step_8)) == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    assert end_of(fork(flags, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert "resuming after step 5" in (tmp_path / "log").read_text()
    assert result(tmp_path / "run") == result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.fault(row=6)
def test_a_stop_during_a_save_completes_it_and_the_same_command_resumes(tmp_path, reference, finished_run):
    corpus_from(finished_run, tmp_path)
    flags = small_flags(tmp_path)
    assert end_of(fork(flags, tmp_path / "log", stop_in_second_save)) == 75, (tmp_path / "log").read_text()
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    assert sorted(path.name for path in checkpoints) in (
        ["checkpoint-10", "checkpoint-20"],
        ["checkpoint-20", "checkpoint-21"],
    )
    for checkpoint in checkpoints:
        verify(checkpoint)
    assert end_of(fork(flags, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert result(tmp_path / "run") == reference


@pytest.mark.slow
@pytest.mark.fault(row=9)
@pytest.mark.parametrize("keep_checkpoints", [1, 2])
def test_incomplete_folders_do_not_displace_valid_checkpoints(keep_checkpoints, tmp_path, reference, finished_run):
    corpus_from(finished_run, tmp_path)
    flags = small_flags(tmp_path, keep_checkpoints=keep_checkpoints)
    assert end_of(fork(flags, tmp_path / "log", plant_incomplete_folders_and_die)) == -signal.SIGKILL, (
        tmp_path / "log"
    ).read_text()
    for step in (40, 30)[:keep_checkpoints]:
        verify(tmp_path / "run" / f"checkpoint-{step}")
    assert end_of(fork(flags, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "checkpoint-9999 is damaged" in log and "resuming after step 40" in log
    assert result(tmp_path / "run") == reference
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == keep_checkpoints


@pytest.mark.fault(row=25)
def test_a_run_resumes_on_its_text_under_another_name(finished_run, reference, tmp_path):
    folder = interrupted_copy(finished_run, tmp_path)
    shutil.rmtree(folder / "run" / reference["checkpoint"])
    newest = folder / "run" / f"checkpoint-{newest_step(folder / 'run')}"
    (folder / "corpus.jsonl").rename(folder / "moved.ndjson")
    done = run(small_flags(folder, dataset=folder / "moved.ndjson"))
    assert done.returncode == 0 and "prepared in" not in done.stdout, (done.stdout, done.stderr)
    assert f"from {newest}" in done.stdout
    assert result(folder / "run") == reference


@pytest.mark.parametrize("kind", ["truncated", "zeroed", "bit-flipped"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.fault(row=8)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    kind, file, finished_run, reference, tmp_path, monkeypatch, capfd
):
    folder = interrupted_copy(finished_run, tmp_path)
    damage(folder / "run" / reference["checkpoint"] / file, kind)
    assert run_here(small_flags(folder), monkeypatch) == 0
    assert "damaged" in capfd.readouterr().err
    assert result(folder / "run") == reference


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EIO])
@pytest.mark.parametrize("function", ["sha256", "load_file"])
@pytest.mark.fault(row=34)
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(
    number, function, finished_run, tmp_path, monkeypatch, capfd
):
    folder = interrupted_copy(finished_run, tmp_path)
    before = files_of(folder)

    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(microbert.train.checkpoint, function, refuse)
    assert run_here(small_flags(folder), monkeypatch) == 1
    errors = capfd.readouterr().err
    assert os.strerror(number) in errors and "damaged" not in errors and "Traceback" not in errors
    assert files_of(folder) == before


@pytest.mark.fault(row=8)
def test_with_every_checkpoint_damaged_the_run_refuses_to_start_over(finished_run, tmp_path, monkeypatch, capfd):
    folder = interrupted_copy(finished_run, tmp_path)
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        damage(checkpoint / "model.safetensors", "truncated")
    before = files_of(folder)
    assert run_here(small_flags(folder), monkeypatch) == 2
    assert "--overwrite" in capfd.readouterr().err
    assert files_of(folder) == before


@pytest.mark.fault(row=20)
@pytest.mark.slow
def test_a_second_run_in_the_folder_is_rejected_and_the_first_is_named(tmp_path):
    flags = small_flags(tmp_path, epochs=2000)
    first = start(flags)
    try:
        wait_for_checkpoint(first, tmp_path / "run")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        second = run(flags)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # processor time, because a busy machine may take longer
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
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
