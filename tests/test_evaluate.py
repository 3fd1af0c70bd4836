"""The command that evaluates a run by the length of its inputs."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, TIME_LIMIT, listing, run_here, small_flags, write_corpus
from models import noisy_model

import microbert.evaluate
from microbert.data.tokenizer import train_tokenizer
from microbert.evaluate import main
from microbert.fill_mask import load_run
from microbert.model.export import save_model
from microbert.runtime.run_folder import LOSS_PICTURE, LOSS_TABLE


def evaluate(monkeypatch, *arguments):
    """Run the command in this process, on few documents. Return its exit code."""
    flags = [str(argument) for argument in (*arguments, "--documents", "20", "--device", "cpu")]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def stored(folder):
    assert (folder / LOSS_PICTURE).read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / LOSS_TABLE).read_text(encoding="utf-8"))


@pytest.fixture
def copy(finished_run, tmp_path):
    """Return a copy of the finished run, with its cache and the corpus that it was trained on."""
    folder = tmp_path / "copy"
    shutil.copytree(finished_run, folder)
    move_text(folder / "run" / "constants.json", folder / "corpus.jsonl")
    return folder


def move_text(record, corpus):
    """Change where a record says that the text is."""
    stored = json.loads(record.read_text())
    stored["config"]["dataset"] = str(corpus)
    record.write_text(json.dumps(stored))


def newest_checkpoint(run):
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))


def test_a_finished_run_is_evaluated_on_its_held_out_documents(finished_run, tmp_path, monkeypatch, capfd):
    def files():  # the hashes are only written if the corpus has not changed for some seconds
        return {name: digest for name, digest in listing(finished_run).items() if name != "cache/file_hashes.json"}

    before = files()
    out = tmp_path / "new" / "out"
    arguments = (finished_run / "run", "--cache-dir", finished_run / "cache", "--output-dir", out)
    assert evaluate(monkeypatch, *arguments) == 0
    printed = capfd.readouterr().out
    found = stored(out)
    assert [one["length"] for one in found["lengths"]] == [8, 16, 32] and found["lengths_left_out"] == []
    held_out = json.loads(next(finished_run.glob("cache/*/tokens-*/manifest.json")).read_text())["report"]["held_out"]
    of_8 = found["lengths"][0]
    assert of_8["documents"] <= held_out == found["documents"] and of_8["masked_tokens"] == 20 * of_8["documents"]
    assert f"text: {held_out} held-out documents" in printed
    for one in found["lengths"]:
        assert f"{one['loss']:.3f}" in printed
    assert len(found["blanks"]) == 5 and all(f'answer: "{blank["word"]}"' in printed for blank in found["blanks"])
    assert 0 < found["weights_rms"]["smallest"] < found["weights_rms"]["largest"] and found["attention_logit"] > 0
    assert "healthy" in printed and str(out / LOSS_PICTURE) in printed
    assert files() == before
    assert evaluate(monkeypatch, *arguments) == 0
    assert stored(out) == found


def test_a_run_and_its_last_checkpoint_have_the_same_losses(copy, monkeypatch):
    checkpoint = newest_checkpoint(copy / "run")
    cache = ("--cache-dir", copy / "cache")
    assert evaluate(monkeypatch, copy / "run", *cache) == evaluate(monkeypatch, checkpoint, *cache) == 0
    assert stored(copy / "run")["lengths"] == stored(checkpoint)["lengths"]


def test_the_files_belong_to_the_run_and_do_not_hinder_it(copy, monkeypatch, capfd):
    """The run stays finished, its checkpoint stays complete, and --overwrite removes what the command has written."""
    assert evaluate(monkeypatch, copy / "run", "--cache-dir", copy / "cache") == 0
    assert evaluate(monkeypatch, newest_checkpoint(copy / "run"), "--cache-dir", copy / "cache") == 0
    assert run_here(small_flags(copy), monkeypatch) == 0
    assert "is finished" in capfd.readouterr().out
    (copy / "run" / "README.md").unlink()
    (copy / "run" / "model.safetensors").unlink()
    assert run_here(small_flags(copy), monkeypatch) == 0
    assert f"from {newest_checkpoint(copy / 'run')}" in capfd.readouterr().out
    flags = [*small_flags(copy), "--prepare-only", "--overwrite"]
    assert run_here(flags, monkeypatch) == 0
    assert not (copy / "run" / LOSS_TABLE).exists() and not (copy / "run" / LOSS_PICTURE).exists()


def test_without_its_cache_the_text_is_prepared_again(copy, monkeypatch, capfd):
    assert evaluate(monkeypatch, copy / "run", "--cache-dir", copy / "cache", "--output-dir", copy / "a") == 0
    assert "preparing" not in capfd.readouterr().out
    shutil.rmtree(copy / "cache")
    assert evaluate(monkeypatch, copy / "run", "--cache-dir", copy / "cache", "--output-dir", copy / "b") == 0
    assert "preparing them again" in capfd.readouterr().out
    assert stored(copy / "a") == stored(copy / "b")


def test_on_other_text_all_of_its_documents_count(finished_run, tmp_path, monkeypatch, capfd):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"body": f"film {n} was a great film of it all"}) + "\n" for n in range(30)))
    arguments = ("--dataset", other, "--text-column", "body", "--output-dir", tmp_path)
    assert evaluate(monkeypatch, finished_run / "run", *arguments, "--cache-dir", tmp_path / "none") == 0
    printed, found = capfd.readouterr().out, stored(tmp_path)
    assert found["documents"] == 20 and "the first 20 documents" in printed
    assert [one["length"] for one in found["lengths"]][0] == 8 and 32 in found["lengths_left_out"]
    assert "left out" in printed and not (tmp_path / "none").exists()
    first, *others = (one["bits_per_byte"] / one["loss"] for one in found["lengths"])
    assert others == pytest.approx([first] * len(others)) and 0.1 < first < 1


def test_the_runs_own_text_under_another_name_still_counts_as_held_out(copy, monkeypatch):
    assert evaluate(monkeypatch, copy / "run", "--cache-dir", copy / "cache", "--output-dir", copy / "a") == 0
    (copy / "corpus.jsonl").rename(copy / "moved.jsonl")
    arguments = ("--dataset", copy / "moved.jsonl", "--cache-dir", copy / "cache", "--output-dir", copy / "b")
    assert evaluate(monkeypatch, copy / "run", *arguments) == 0
    assert stored(copy / "a")["lengths"] == stored(copy / "b")["lengths"]
    assert evaluate(monkeypatch, newest_checkpoint(copy / "run"), *arguments) == 0
    assert stored(copy / "a")["lengths"] == stored(copy / "b")["lengths"]
    change_tokenizer(copy)
    assert evaluate(monkeypatch, copy / "run", *arguments) == 2


def test_a_model_without_a_record_needs_a_text(finished_run, tmp_path, monkeypatch, capfd):
    tokenizer = train_tokenizer(
        lambda: iter(["a great film of it", "a bad scene"] * 3), vocab_size=60, lowercase=True, strip_accents=False
    )
    model = noisy_model(vocab_size=tokenizer.get_vocab_size(), max_seq_len=600, arch="modern")
    save_model(model, tokenizer, tmp_path)
    assert evaluate(monkeypatch, tmp_path) == 2
    assert "--dataset" in capfd.readouterr().err
    write_corpus(tmp_path / "texts.jsonl")
    assert evaluate(monkeypatch, tmp_path, "--dataset", tmp_path / "texts.jsonl") == 0
    lengths = [one["length"] for one in stored(tmp_path)["lengths"]] + stored(tmp_path)["lengths_left_out"]
    assert lengths == [8, 16, 32, 64, 128, 256, 512]


def change_text(copy):
    write_corpus(copy / "corpus.jsonl", n_documents=299)


def change_tokenizer(copy):
    """Replace the tokenizer of the run by one that swaps two tokens."""
    path = copy / "run" / "tokenizer.json"
    whole = json.loads(path.read_text())
    vocabulary = whole["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    path.write_text(json.dumps(whole))


def remove_text(copy):
    (copy / "corpus.jsonl").unlink()


def damage_weights(copy):
    (copy / "run" / "model.safetensors").write_bytes(b"no")


def damage_record(copy):
    (copy / "run" / "constants.json").write_text("{")


def remove_model(copy):
    (copy / "run" / "config.json").unlink()


FAULTS = {
    change_text: "was trained on other text",
    change_tokenizer: "the tokenizer of",
    remove_text: "is not an existing file",
    damage_weights: "cannot be loaded",
    damage_record: "constants.json is damaged",
    remove_model: "holds no model yet",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_is_not_the_runs_or_is_damaged_is_refused_in_one_line(fault, copy, monkeypatch, capfd):
    fault(copy)
    before = listing(copy / "run")
    assert evaluate(monkeypatch, copy / "run", "--cache-dir", copy / "cache") == 2
    printed = capfd.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and FAULTS[fault] in printed.err
    assert "loss by" not in printed.out and listing(copy / "run") == before


def test_a_checkpoint_whose_text_has_changed_is_refused(copy, monkeypatch, capfd):
    checkpoint = newest_checkpoint(copy / "run")
    move_text(checkpoint / "state.json", copy / "corpus.jsonl")
    change_text(copy)
    assert evaluate(monkeypatch, checkpoint, "--cache-dir", copy / "other") == 2
    assert "--dataset" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(finished_run, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(microbert.evaluate, "find_text", None)  # any work fails
    assert evaluate(monkeypatch, finished_run / "run", "--output-dir", tmp_path / "file" / "x") == 2
    assert "is not a writable folder" in capfd.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert evaluate(monkeypatch, finished_run / "run") == 2
    assert "is not a writable folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--documents", "0"], "documents"),
        (["--seed", "x"], "seed"),
        (["--device", "tpu"], "device"),
        (["--sed", "1"], "--sed"),
    ],
)
def test_a_wrong_flag_is_bad_input(flags, words, finished_run, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["evaluate", str(finished_run / "run"), *flags])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and words in capfd.readouterr().err


def test_a_run_shows_the_same_measure_of_fewer_documents(finished_run):
    folder = finished_run / "run"
    found = json.loads((folder / LOSS_TABLE).read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    [by_length] = [line for line in lines if "by_length/loss_8" in line]
    card = (folder / "README.md").read_text()
    assert found["step"] == by_length["step"] == lines[-1]["step"]
    for one in found["lengths"]:
        assert by_length[f"by_length/loss_{one['length']}"] == one["loss"]
        assert f"| {one['length']} | {one['loss']:.3f} |" in card
    assert [one["length"] for one in found["lengths"]] == [8, 16, 32]
    model, _ = load_run(folder)
    assert model.config.max_seq_len == 32


@pytest.mark.slow
def test_the_command_works_as_a_user_starts_it(finished_run, tmp_path):
    flags = ["--cache-dir", finished_run / "cache", "--output-dir", tmp_path, "--documents", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "microbert.evaluate", finished_run / "run", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert stored(tmp_path)["lengths"]
