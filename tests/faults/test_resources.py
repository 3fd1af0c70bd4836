"""A full or read-only disk, no free memory, NaN: reported in one line, and saved work is resumed."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from configs import configure
from helpers import (
    LARGEST_FILE,
    ROOT,
    SCRIPT,
    TIME_LIMIT,
    corpus_from,
    patched_script,
    result,
    run,
    run_as_user,
    run_here,
    small_flags,
)
from safetensors.torch import load_file
from small_disk import SmallDisk, has_small_disks

import microbert.train.loop
from microbert.errors import InputError
from microbert.runtime.run import open_run
from microbert.train.checkpoint import verify


@pytest.mark.parametrize("learning_rate", ["1e20", "1e38"])
@pytest.mark.fault(row=24)
def test_nan_stops_the_run_before_the_step_is_applied(learning_rate, tmp_path, monkeypatch, capfd):
    flags = [*small_flags(tmp_path, save_every=1), "--lr", learning_rate, "--lr-scaling", "none", "--warmup-ratio", "0"]
    assert run_here(flags, monkeypatch) == 1
    errors = capfd.readouterr().err
    assert ("not applied" in errors or "not saved" in errors) and "Traceback" not in errors
    assert all(
        weight.isfinite().all()
        for file in (tmp_path / "run").glob("checkpoint-*/*.safetensors")
        for weight in load_file(file).values()
    )
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 1


@pytest.mark.parametrize("largest_file", [2_000, LARGEST_FILE])  # bytes: the first is smaller than the tokenizer
@pytest.mark.fault(row=22)
@pytest.mark.slow
def test_a_file_that_cannot_grow_is_reported_and_the_same_command_resumes(
    largest_file, finished_run, reference, tmp_path
):
    corpus_from(finished_run, tmp_path)
    flags = small_flags(tmp_path)
    full = run_as_user(
        flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    )
    assert full.returncode == 1
    assert (
        "ulimit -f" in full.stderr
        and "run the same command to resume" in full.stderr
        and "Traceback" not in full.stderr
    )
    assert str(tmp_path / "run") in full.stderr and str(tmp_path / "cache") in full.stderr
    assert bool(list((tmp_path / "run").glob("checkpoint-*"))) == (largest_file > 2_000)
    assert run(flags).returncode == 0
    assert result(tmp_path / "run") == reference


@pytest.fixture
def small_disk():
    if not has_small_disks():
        pytest.skip("a small disk requires Linux, and root or user namespaces")
    with SmallDisk(megabytes=2) as disk:
        yield disk


def run_on(disk, flags, script=SCRIPT):
    return subprocess.run(
        disk.command([sys.executable, str(script), *flags]), capture_output=True, text=True, timeout=TIME_LIMIT
    )


FILLED_AT_THE_SECOND_SAVE = """import microbert.train.loop as training
sys.path.insert(0, {tests!r})
from small_disk import BALLAST, fill
real, saves = training.save_checkpoint, []
def save(run, *others):
    saves.append(run)
    if len(saves) == 2:
        fill(run.folder.parent / BALLAST)
    real(run, *others)
training.save_checkpoint = save"""


@pytest.mark.fault(row=22)
@pytest.mark.slow
def test_a_full_disk_is_reported_and_with_free_space_the_run_resumes_at_the_checkpoint(
    small_disk, finished_run, reference, tmp_path
):
    corpus_from(finished_run, tmp_path)
    flags = small_flags(tmp_path, output_dir=small_disk.mount_point / "run")
    full = run_on(
        small_disk,
        flags,
        patched_script(tmp_path / "fills.py", FILLED_AT_THE_SECOND_SAVE.format(tests=str(ROOT / "tests"))),
    )
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "error: the disk is full" in full.stderr and "run the same command to resume" in full.stderr
    assert [path.name for path in small_disk.path.glob("run/checkpoint-*")] == ["checkpoint-10"]
    verify(small_disk.path / "run" / "checkpoint-10")
    small_disk.free()
    again = run_on(small_disk, flags)
    assert again.returncode == 0, again.stderr
    assert "resuming after step 10" in again.stdout
    assert result(small_disk.path / "run") == reference


@pytest.mark.fault(row=23)
def test_a_read_only_folder_is_reported_before_preparation(small_disk, tmp_path):
    small_disk.make_read_only()
    flags = small_flags(tmp_path, output_dir=small_disk.mount_point / "run")
    done = run_on(small_disk, flags)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: output_dir = '{small_disk.mount_point / 'run'}' cannot be written: Read-only file system\n"
    )
    assert not list(small_disk.path.iterdir()) and not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.fault(row=23)
def test_a_run_in_a_folder_that_became_read_only_is_refused_and_unchanged(small_disk, finished_run, tmp_path):
    corpus_from(finished_run, tmp_path)
    shutil.copytree(finished_run / "run", small_disk.path / "run")
    (small_disk.path / "run" / "README.md").unlink()
    small_disk.make_read_only()
    done = run_on(small_disk, small_flags(tmp_path, output_dir=small_disk.mount_point / "run"))
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: output_dir = '{small_disk.mount_point / 'run'}' cannot be written: Read-only file system\n"
    )


def caused(full):
    raise RuntimeError("could not write") from full


def hidden(full):
    try:
        caused(full)
    except RuntimeError:
        raise InputError("the dataset cannot be read") from None


def directly(full):
    raise full


@pytest.mark.parametrize("number, filename", [(errno.ENOSPC, None), (errno.EDQUOT, None), (errno.ENOSPC, "/mnt/x.bin")])
@pytest.mark.parametrize("raise_it", [directly, caused, hidden])
@pytest.mark.fault(row=22)
def test_a_full_disk_is_reported_with_the_folders_to_check(
    raise_it, number, filename, finished_run, tmp_path, monkeypatch, capfd
):
    import microbert.data.prepare

    corpus_from(finished_run, tmp_path)

    def prepare_tokens(*arguments):
        raise_it(OSError(number, "full", filename) if filename else OSError(number, "full"))

    monkeypatch.setattr(microbert.data.prepare, "prepare_tokens", prepare_tokens)
    assert run_here(small_flags(tmp_path), monkeypatch) == 1
    errors = capfd.readouterr().err
    places = [filename] if filename else [str(tmp_path / "run"), str(tmp_path / "cache")]
    assert f"the disk is full ({' or '.join(places)})" in errors and "Traceback" not in errors
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)


@pytest.mark.fault(row=22)
def test_for_a_dataset_of_the_hub_its_downloads_are_such_a_folder(tmp_path, capfd):
    from huggingface_hub.constants import HF_HOME

    config = configure(dataset="org/name", output_dir=str(tmp_path / "run"))
    with pytest.raises(SystemExit) as stop, open_run(config):
        raise OSError(errno.ENOSPC, "full")
    assert stop.value.code == 1
    assert f"or {HF_HOME})" in capfd.readouterr().err


@pytest.mark.fault(row=34)
@pytest.mark.parametrize("raise_it", [directly, caused, hidden])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_shortage_is_reported_and_nothing_is_removed(number, raise_it, tmp_path, monkeypatch, capfd):
    import microbert.data.prepare

    def open_tokens(folder, *_):
        raise_it(OSError(number, os.strerror(number), str(folder / "train.bin")))

    with monkeypatch.context() as patch:
        patch.setattr(microbert.data.prepare, "open_tokens", open_tokens)
        assert run_here(small_flags(tmp_path), monkeypatch) == 1
    errors = capfd.readouterr().err
    [path] = (tmp_path / "cache").rglob("train.bin")
    assert f"error: {os.strerror(number)}: {path} (" in errors and "run the same command to resume" in errors
    assert "Traceback" not in errors and "damaged" not in errors
    assert run_here([*small_flags(tmp_path), "--prepare-only"], monkeypatch) == 0
    assert "prepared in" not in capfd.readouterr().out


@pytest.mark.fault(row=34)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_reported_in_one_line(number, finished_run, tmp_path, monkeypatch, capfd):
    import microbert.data.prepare

    corpus_from(finished_run, tmp_path)
    error = OSError(number, os.strerror(number), "x.bin")
    monkeypatch.setattr(microbert.data.prepare, "prepare_tokens", lambda *_: directly(error))
    assert run_here(small_flags(tmp_path), monkeypatch) == 1
    errors = capfd.readouterr().err
    assert errors.endswith(f"error: {os.strerror(number)}: x.bin\n") and "Traceback" not in errors


@pytest.mark.parametrize("constant", ["output_dir", "cache_dir"])
@pytest.mark.fault(row=28)
def test_a_folder_name_that_is_too_long_is_reported_in_one_line(constant, finished_run, tmp_path, monkeypatch, capfd):
    corpus_from(finished_run, tmp_path)
    assert run_here(small_flags(tmp_path, **{constant: tmp_path / ("x" * 300)}), monkeypatch) == 2
    errors = capfd.readouterr().err
    assert errors.startswith(f"error: {constant} = ") and "File name too long" in errors
    assert errors.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_any_other_error_prints_its_traceback(finished_run, tmp_path, monkeypatch, capfd):
    import microbert.data.prepare

    corpus_from(finished_run, tmp_path)
    error = FileNotFoundError(errno.ENOENT, "gone")
    monkeypatch.setattr(microbert.data.prepare, "prepare_tokens", lambda *_: directly(error))
    assert run_here(small_flags(tmp_path), monkeypatch) == 1
    errors = capfd.readouterr().err
    assert "Traceback" in errors and "disk is full" not in errors


@pytest.mark.fault(row=26)
def test_memory_that_runs_out_while_saving_is_reported_in_one_line(tmp_path, monkeypatch, capfd):
    def save_checkpoint(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(microbert.train.loop, "save_checkpoint", save_checkpoint)
    assert run_here(small_flags(tmp_path), monkeypatch) == 1
    err = capfd.readouterr().err
    assert "error: out of memory (CUDA out of memory. Tried to allocate 3.00 GiB)" in err and "Traceback" not in err
    assert "out of memory" in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]
