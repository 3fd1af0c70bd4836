"""The run's folder loads in stock transformers without a warning, fills masks, and holds no incomplete save."""

import json
import shutil

import pytest
from helpers import run_module, run_python

from microbert.fill_mask import fill_mask, load_run
from microbert.train.checkpoint import verify

LOAD = """import sys, transformers
model, report = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report.values()), report
print(type(model).__name__, len(transformers.pipeline("fill-mask", model=sys.argv[1])("the film was [MASK]")))
"""


@pytest.mark.slow
def test_transformers_loads_the_run_and_its_checkpoints_without_a_warning_about_weights(
    finished_run, reference, tmp_path
):
    (tmp_path / "load.py").write_text(LOAD)
    for folder in (finished_run / "run", finished_run / "run" / reference["checkpoint"]):
        done = run_python([str(tmp_path / "load.py"), str(folder)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["BertForMaskedLM", "5"]
        for word in ("missing", "unexpected", "newly initialized", "not used"):
            assert word not in done.stderr.lower()


def test_the_folder_holds_all_files_of_a_finished_run(finished_run):
    names = {path.name for path in (finished_run / "run").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "README.md",
        "metrics.jsonl",
        "training_curve.png",
        "status.json",
    } <= names
    status = json.loads((finished_run / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["rank"]) == ("done", 0, 0)


def test_metrics_have_evaluations_at_the_start_the_end_and_between(finished_run):
    lines = [json.loads(line) for line in (finished_run / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "eval/loss" in line]
    assert evaluated[0] == 0 and evaluated[-1] == max(line["step"] for line in lines) and len(evaluated) > 2
    trained = [line for line in lines if "train/loss" in line]
    assert {
        "train/learning_rate",
        "train/grad_norm",
        "train/samples_per_second",
        "train/tokens_per_second",
        "train/peak_memory_gb",
    } <= set(trained[0])
    assert lines[-1]["epoch"] == 2.0


def test_fill_mask_agrees_with_the_pipeline_of_transformers(finished_run):
    import transformers

    model, tokenizer = load_run(finished_run / "run")
    ours = fill_mask(model, tokenizer, "the film was [MASK]")[0]
    theirs = transformers.pipeline("fill-mask", model=str(finished_run / "run"), top_k=20)("the film was [MASK]")
    theirs = [answer["token_str"] for answer in theirs if not answer["token_str"].startswith("[")][: len(ours)]
    assert [tokenizer.decode([tokenizer.token_to_id(token)]) for token, _ in ours] == theirs


def test_fill_mask_on_the_command_line(finished_run):
    done = run_module("fill_mask", str(finished_run / "run"), "the film was [MASK]", "a [MASK] [MASK]")
    assert done.returncode == 0 and done.stdout.count("%") == 15


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{run}", "no mask here"], "[MASK]"),
        (["{run}/nowhere", "a [MASK]"], "holds no model"),
        (["{run}", "[MASK] " + "word " * 100], "at most 32"),
    ],
)
def test_fill_mask_reports_mistakes(arguments, words, finished_run):
    done = run_module("fill_mask", *(argument.format(run=finished_run / "run") for argument in arguments))
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_of_an_older_version_without_the_vocabulary_is_whole(finished_run, reference, tmp_path):
    path = shutil.copytree(finished_run / "run" / reference["checkpoint"], tmp_path / "checkpoint-1")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "vocab.txt").write_text("another\n")
    with pytest.raises(ValueError, match="vocab.txt is not what was saved"):
        verify(path)
    del manifest["vocab.txt"]
    (path / "vocab.txt").unlink()
    (path / "manifest.json").write_text(json.dumps(manifest))
    verify(path)
