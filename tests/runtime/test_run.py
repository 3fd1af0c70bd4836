"""How a run ends: nothing fails after the export, bad input removes no work, no run is mistaken for another."""

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import types

import pytest
from configs import configure
from helpers import SCRIPT, interrupted_copy, listing, run_here, small_flags
from launches import launch, status

import microbert.runtime.run
import microbert.train.export_run
from microbert.errors import InputError, Stopped
from microbert.runtime.run import _print_on_rank_0_only, open_run
from microbert.runtime.run_folder import take_lock


def finish(folder, *, is_done, body=lambda run: None):
    """Run `body` without training. Return the exit code and the contents of status.json."""
    try:
        with open_run(configure(output_dir=str(folder))) as run:
            run.is_done = is_done
            body(run)
    except SystemExit as end:
        return end.code, status(folder)
    return 0, status(folder)


def raising(error):
    def body(*arguments):
        raise error

    return body


@pytest.mark.fault(row=33)
@pytest.mark.parametrize(
    "error",
    [
        InputError("the text has 14 tokens"),
        UnicodeEncodeError("cp1252", "\u0e17", 0, 1, "?"),
        OSError(errno.ENOSPC, "no space"),
        RuntimeError("gloo"),
        Stopped("a signal"),
        MemoryError(),
        KeyboardInterrupt(),
        SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_once_the_model_is_written_an_error_is_a_warning(error, tmp_path, capsys):
    code, end = finish(tmp_path / "run", is_done=True, body=raising(error))
    assert (code, end["state"], end["exit_code"]) == (0, "done", 0)
    errors = capsys.readouterr().err
    assert errors.startswith("warning: ") and errors.count("\n") == 1 and type(error).__name__ in errors


@pytest.mark.fault(row=33)
def test_once_the_model_is_written_a_signal_changes_nothing(tmp_path, capsys):
    code, end = finish(tmp_path / "run", is_done=True, body=lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert (code, end["state"]) == (0, "done") and not capsys.readouterr().err


@pytest.mark.fault(row=33)
def test_a_finished_run_succeeds_when_its_status_cannot_be_written(tmp_path, monkeypatch, capsys):
    real = microbert.runtime.run.write_json

    def write_json(path, value):
        if value["state"] == "done":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, value)

    monkeypatch.setattr(microbert.runtime.run, "write_json", write_json)
    assert finish(tmp_path / "run", is_done=True)[0] == 0
    assert "is complete" in capsys.readouterr().err
    assert finish(tmp_path / "other", is_done=False)[0] == 1  # there is no complete model yet


@pytest.mark.fault(row=33)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_a_finished_run_succeeds_when_its_log_is_full(tmp_path, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, end = finish(tmp_path / "run", is_done=True, body=lambda run: print("the examples", flush=True))
        assert (code, end["state"]) == (0, "done")
        full.flush()  # as Python does when it exits: the buffer is empty


@pytest.mark.parametrize("work", ["checkpoint-10", "model.safetensors"])
def test_bad_input_in_the_middle_of_a_run_removes_no_work(work, tmp_path):
    def body(run):
        (run.folder / work).mkdir()
        raise InputError("a damaged block")

    code, end = finish(tmp_path / "new" / "run", is_done=False, body=body)
    assert (code, end["state"], end["reason"]) == (2, "failed", "a damaged block")
    assert (tmp_path / "new" / "run" / work).is_dir()


def test_bad_input_before_any_work_leaves_no_folder(tmp_path):
    def body(run):
        (run.folder / "metrics.jsonl").write_text("")
        raise InputError("no such column")

    assert finish(tmp_path / "new" / "run", is_done=False, body=body) == (2, {})
    assert not (tmp_path / "new").exists()


def test_prints_of_other_ranks_are_discarded_in_any_encoding():
    with _print_on_rank_0_only(types.SimpleNamespace(is_first=False)):
        sys.stdout.reconfigure(encoding="ascii", errors=sys.stdout.errors)
        print("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35")


def test_a_name_that_is_not_utf_8_is_written_to_status_json(tmp_path):
    code, end = finish(tmp_path / "run", is_done=False, body=raising(RuntimeError("no file caf\udce9.txt")))
    assert code == 1 and end["reason"] == "RuntimeError: no file caf\udce9.txt"


def test_an_earlier_process_is_not_named_as_the_holder_of_a_folder(tmp_path):
    import filelock

    finish(tmp_path, is_done=True)
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(InputError, match="in use by another process"):
        take_lock(tmp_path, filelock.FileLock(tmp_path / ".lock", is_singleton=False))


@pytest.mark.fault(row=33)
@pytest.mark.slow
def test_a_run_of_short_sequences_with_names_that_are_hard_to_print_succeeds(tmp_path, monkeypatch):
    """Names with part of a formula, a table's separator, and letters that the log cannot encode."""
    corpus = tmp_path / "\u0e17|`.txt"
    lines = (f"scene {number} of the film was {word} and slow .\n" for number in range(40) for word in ("good", "bad"))
    corpus.write_text("".join(lines))
    flags = small_flags(tmp_path, dataset=corpus, output_dir=tmp_path / "x_{$\\$ \u0e17", max_seq_len=5, epochs=1)
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        assert run_here(flags, monkeypatch) == 0
        assert run_here(flags, monkeypatch) == 0
    folder = tmp_path / "x_{$\\$ \u0e17"
    assert status(folder)["state"] == "done" and (folder / "training_curve.png").exists()
    printed = (tmp_path / "out").read_text(encoding="ascii")
    assert all(text in printed for text in ("examples from held-out text", "[MASK]", "is finished"))
    assert "warning: the model" not in printed
    assert "\\|\\`.txt" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.fault(row=33)
def test_a_run_succeeds_without_its_examples(finished_run, tmp_path, monkeypatch, capfd):
    copy = interrupted_copy(finished_run, tmp_path)
    monkeypatch.setattr(microbert.train.export_run, "find_examples", raising(ValueError("a fault")))
    assert run_here(small_flags(copy), monkeypatch) == 0
    printed = capfd.readouterr()
    assert "warning: no examples are shown (ValueError: a fault)" in printed.err and "examples from" not in printed.out
    assert "## Examples" not in (copy / "run" / "README.md").read_text() and status(copy / "run")["state"] == "done"


def test_a_run_succeeds_without_its_loss_by_length(finished_run, tmp_path, monkeypatch, capfd):
    copy = interrupted_copy(finished_run, tmp_path)
    monkeypatch.setattr(microbert.train.export_run, "loss_by_length", raising(RuntimeError("a fault")))
    assert run_here(small_flags(copy), monkeypatch) == 0
    printed = capfd.readouterr()
    assert "warning: the loss by length cannot be measured or written (RuntimeError: a fault)" in printed.err
    card = (copy / "run" / "README.md").read_text()
    assert "## Loss by length" not in card and "## Examples" in card and status(copy / "run")["state"] == "done"


def test_an_export_that_was_killed_writes_the_loss_by_length_once(finished_run, tmp_path, monkeypatch):
    copy = interrupted_copy(finished_run, tmp_path)
    assert run_here(small_flags(copy), monkeypatch) == 0
    metrics = (copy / "run" / "metrics.jsonl").read_text()
    assert metrics.count("by_length/loss_8") == 1
    assert metrics.splitlines()[-1] == (finished_run / "run" / "metrics.jsonl").read_text().splitlines()[-1]


@pytest.fixture
def finished(finished_run, tmp_path):
    """A copy of the finished run and its corpus: the dataset has moved, and its text is the same."""
    shutil.copytree(finished_run, tmp_path / "moved")
    return tmp_path / "moved"


@contextlib.contextmanager
def unchanged(folder, *names):
    before = listing(folder)
    yield
    after = listing(folder)
    for name in names:
        before.pop(name), after.pop(name)
    assert after == before


def end_of(flags, monkeypatch, capfd):
    """Start the run and its dry run. Return the exit code and the errors, which must be equal."""
    ends = []
    for dry_run in ([], ["--dry-run"]):
        capfd.readouterr()
        ends.append((run_here([*flags, *dry_run], monkeypatch), capfd.readouterr().err))
    assert ends[0] == ends[1] and "Traceback" not in ends[0][1]
    return ends[0]


@pytest.mark.fault(row=7)
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"save_every": 7, "keep_checkpoints": 1, "device": "cpu", "micro_batch_size": 4, "cuda_graphs": False},
        {"cache_dir": "elsewhere"},
    ],
    ids=["nothing", "what may change", "no cache"],
)
def test_the_same_command_on_a_finished_run_changes_nothing(changed, finished, monkeypatch, capfd):
    monkeypatch.chdir(finished)
    with unchanged(finished, "run/status.json"):
        assert end_of(small_flags(finished, **changed), monkeypatch, capfd) == (0, "")


@pytest.mark.fault(row=7)
@pytest.mark.parametrize(
    "changed, messages",
    [
        ({"seed": 1, "epochs": 3}, ["seed = 1 (was 42)", "epochs = 3 (was 2)"]),
        ({"max_seq_len": 16}, ["max_seq_len = 16 (was 32)"]),
        ({"max_samples": 100}, ["max_samples = 100 (was None)"]),
        ({"batch_size": 4}, ["batch_size = 4 (was 8)"]),
        ({"dataset": "imdb"}, ["dataset = 'imdb' (was '"]),
        ({"dataset": "other.jsonl"}, ["dataset = 'other.jsonl' (was '"]),
        ({"dataset": "some/where"}, ["dataset = 'some/where' (was '"]),
        ({"dataset": "hf", "n_layers": 2}, ["n_layers = 2 (was 1)", "dataset = 'hf' (was '"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_command_on_a_finished_run_names_what_differs(changed, messages, finished, monkeypatch, capfd):
    monkeypatch.chdir(finished)
    (finished / "other.jsonl").write_text('{"text": "another text"}\n')
    with unchanged(finished):
        code, errors = end_of(small_flags(finished, **changed), monkeypatch, capfd)
    assert code == 2 and errors.count("\n") == 1 and all(text in errors for text in messages)


@pytest.mark.fault(row=7)
@pytest.mark.parametrize("left", ["constants.json", "checkpoints", '{"n_layers": "1"}', '{"n_layers": 1}', "[]"])
def test_constants_or_a_checkpoint_identify_a_finished_run(left, finished, finished_run, monkeypatch, capfd):
    if left == "checkpoints":
        (finished / "run" / "constants.json").unlink()
    elif left == "constants.json":
        for path in (finished / "run").glob("checkpoint-*"):
            shutil.rmtree(path)
    else:  # damaged
        (finished / "run" / "constants.json").write_text(f'{{"format": 1, "corpus": "c", "config": {left}}}')
    corpus = finished_run / "corpus.jsonl"  # the original name: without constants.json, names are compared
    code, errors = end_of(small_flags(finished, dataset=corpus), monkeypatch, capfd)
    assert code == 0 and ("is damaged" in errors) == (left not in ("constants.json", "checkpoints"))
    (finished / "other.jsonl").write_text('{"text": "another text"}\n')
    code, errors = end_of(small_flags(finished, dataset=finished / "other.jsonl"), monkeypatch, capfd)
    assert code == 2 and f"dataset = '{finished / 'other.jsonl'}' (was '{corpus}')" in errors


@pytest.mark.fault(row=7)
def test_a_finished_run_from_before_a_constant_existed_is_compared_with_what_it_had(finished, monkeypatch, capfd):
    path = finished / "run" / "constants.json"
    stored = json.loads(path.read_text())
    assert stored["config"].pop("rows") == "packed" and stored["config"].pop("embedding_init") == "random"
    path.write_text(json.dumps(stored))
    assert end_of(small_flags(finished), monkeypatch, capfd) == (0, "")


@pytest.mark.fault(row=7)
def test_a_finished_run_with_unknown_constants_is_not_mistaken_for_this_one(finished, monkeypatch, capfd):
    (finished / "run" / "constants.json").unlink()
    for path in (finished / "run").glob("checkpoint-*"):
        shutil.rmtree(path)
    code, errors = end_of(small_flags(finished), monkeypatch, capfd)
    assert code == 2 and "--overwrite" in errors and (finished / "run" / "model.safetensors").exists()


@pytest.mark.fault(row=7)
def test_text_that_has_changed_since_the_run_finished_is_noticed(finished, monkeypatch, capfd):
    flags = small_flags(finished)
    record = finished / "run" / "constants.json"
    known = json.loads(record.read_text())
    record.write_text(json.dumps(known | {"config": known["config"] | {"dataset": str(finished / "corpus.jsonl")}}))
    assert end_of(flags, monkeypatch, capfd)[0] == 0
    with open(finished / "corpus.jsonl", "a") as file:
        file.write('{"text": "one more document"}\n')
    code, errors = end_of(flags, monkeypatch, capfd)
    assert code == 2 and "held other text then" in errors


@pytest.mark.fault(row=7)
def test_a_dataset_of_the_hub_is_compared_by_name_without_the_network(finished, monkeypatch, capfd):
    record = finished / "run" / "constants.json"
    known = json.loads(record.read_text())
    record.write_text(json.dumps(known | {"config": known["config"] | {"dataset": "org/name"}}))
    assert end_of(small_flags(finished, dataset="org/name"), monkeypatch, capfd) == (0, "")
    for changed, message in [
        ({"streaming": True}, "streaming = True (was False)"),
        ({"dataset": "org/name:part"}, "dataset = 'org/name:part' (was 'org/name')"),
    ]:
        code, errors = end_of(small_flags(finished, **{"dataset": "org/name", **changed}), monkeypatch, capfd)
        assert code == 2 and message in errors


@pytest.mark.fault(row=7)
@pytest.mark.slow
def test_two_processes_on_a_finished_run_end_with_the_same_code(finished, tmp_path):
    """Rank 0 alone checks the folder; status.json of the finished run stays."""
    done = launch(small_flags(finished, batch_size=4, global_batch_size=8), 2, script=SCRIPT)
    assert done[0] == 0 and "is finished" in done[1]
    code, _, errors = launch(small_flags(finished, batch_size=4, global_batch_size=8, seed=1), 2, script=SCRIPT)
    assert code == 2 and "seed = 1 (was 42)" in errors and "Traceback" not in errors
