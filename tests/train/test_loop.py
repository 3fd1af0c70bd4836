"""What a run learns, and what it warns about."""

import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import transformers
from configs import configure, resolve
from helpers import ROOT, TIME_LIMIT, corpus_from, result, run_here, small_flags, write_corpus
from models import as_sequences, noisy_model

import microbert.train.step
from microbert.data.tokenizer import CLS_ID, PAD_ID, SEP_ID, UNK_ID
from microbert.errors import Failed
from microbert.runtime.run import Run
from microbert.train.held_out import evaluate
from microbert.train.log import TrainingLog
from microbert.train.step import Learner


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["eval/loss"] for line in lines if "eval/loss" in line]


def alternating_corpus(folder):
    """Write text in which each word follows from its neighbours: three words in a fixed cycle."""
    words = ["alpha", "beta", "gamma"]
    lines = [
        json.dumps({"text": " ".join(words[(start + i) % 3] for i in range(25 + start % 4))}) for start in range(300)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
def test_a_run_learns_a_predictable_text(tmp_path, monkeypatch, capfd):
    alternating_corpus(tmp_path)
    flags = small_flags(tmp_path, n_embed=16, n_layers=2, epochs=60, vocab_size=40, eval_every=500, save_every=1000)
    assert run_here(flags, monkeypatch) == 0
    losses = evaluations(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(3), abs=0.1)  # three equally frequent words: unigram entropy
    assert losses[-1] < 0.3
    assert "warning" not in capfd.readouterr().out


def test_a_run_with_a_time_limit_evaluates_a_sample_before_the_end(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("microbert.train.loop.SAMPLE_SEQUENCES", 3)
    assert run_here(small_flags(tmp_path, max_minutes=60, eval_every=10), monkeypatch) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    *before, last = [line for line in lines if "eval/loss" in line]
    assert len(before) > 1 and {line["eval/sequences"] for line in before} == {3}
    out = capfd.readouterr().out
    n_held_out = int(re.search(r"(\d+) held out\n", out)[1])
    assert f"held-out loss: {last['eval/loss']:.4f}; accuracy" in out
    assert last["eval/sequences"] == n_held_out > 3
    # the same run without a limit ends with the same loss, on the same sequences
    assert run_here([*small_flags(tmp_path, eval_every=10), "--output-dir", str(tmp_path / "whole")], monkeypatch) == 0
    assert evaluations(tmp_path / "whole")[-1] == last["eval/loss"]
    assert evaluations(tmp_path / "whole")[0] != before[0]["eval/loss"]


def test_a_run_whose_time_runs_out_during_an_evaluation_still_evaluates_all(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("microbert.train.loop.SAMPLE_SEQUENCES", 3)
    flags = small_flags(tmp_path, max_minutes=60, eval_every=10)
    real_step, real_write, real_seconds = Learner.step, TrainingLog.write_evaluation, TrainingLog.seconds
    late = 0.0

    def step(learner, masked, number, *others):
        if number == 8:  # noticed at the next step
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(learner, masked, number, *others)

    def write_evaluation(log, *result):
        nonlocal late
        real_write(log, *result)
        late = 3600.0

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", step)
        assert run_here(flags, patch) == 75
    monkeypatch.setattr(TrainingLog, "write_evaluation", write_evaluation)
    monkeypatch.setattr(TrainingLog, "seconds", lambda log: real_seconds(log) + late)
    capfd.readouterr()
    assert run_here(flags, monkeypatch) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    sample, last = [line for line in lines if line["step"] == 10 and "eval/loss" in line]
    assert sample["eval/sequences"] == 3 < last["eval/sequences"] and lines[-1]["step"] == 10
    assert f"held-out loss: {last['eval/loss']:.4f}; accuracy" in capfd.readouterr().out


def test_a_learning_rate_too_low_to_learn_is_a_warning(tmp_path, monkeypatch, capfd):
    alternating_corpus(tmp_path)
    assert run_here([*small_flags(tmp_path), "--lr-scaling", "none"], monkeypatch) == 0
    out = capfd.readouterr().out
    assert "cannot learn" in out and 'lr_scaling = "auto"' in out
    assert "no better than guessing by word frequency" in out


@pytest.mark.slow
def test_the_remaining_time_does_not_include_a_slow_first_step(tmp_path, monkeypatch, capfd):
    real, ends = microbert.train.step.Learner.step, []

    def slow_at_first(self, masked, number, *others):
        time.sleep(0 if ends else 6)
        step = real(self, masked, number, *others)
        ends.append(time.perf_counter())
        return step

    monkeypatch.setattr(microbert.train.step.Learner, "step", slow_at_first)
    assert run_here(small_flags(tmp_path), monkeypatch) == 0
    minutes, seconds = map(int, re.findall(r"100%.*\[(\d+):(\d+)<", capfd.readouterr().err)[-1])
    assert 60 * minutes + seconds < ends[-1] - ends[0] + 4


@pytest.mark.slow
def test_version_2_trains_on_compressed_files_and_writes_a_folder_that_transformers_loads(tmp_path):
    lines = write_corpus(tmp_path / "plain.txt", n_documents=400).read_bytes().splitlines(keepends=True)
    (tmp_path / "plain.txt").unlink()
    for number in range(4):
        (tmp_path / f"part-{number}.jsonl.gz").write_bytes(
            gzip.compress(b"".join(lines[number * 100 : (number + 1) * 100]))
        )
    flags = small_flags(tmp_path, dataset=tmp_path / "part-*.jsonl.gz", n_layers=2, packing=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "mlm_pretrain_v2.py"), *flags], capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert "documents: 400 read" in done.stdout
    (path,) = tmp_path.glob("cache/*/tokens-*/train.bin")
    assert (np.fromfile(path, np.uint16).reshape(-1, 32)[:-1] != PAD_ID).all()  # only the last one has padding
    losses = evaluations(tmp_path / "run")
    assert losses[-1] < losses[0]

    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert (model.config.num_hidden_layers, model.config.num_attention_heads, model.config.hidden_size) == (2, 4, 8)
    batch = tokenizer("the film was [MASK] and slow", return_tensors="pt")
    logits = model(**batch).logits
    assert logits.shape == (1, batch["input_ids"].shape[1], len(tokenizer)) and logits.isfinite().all()


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(reference, finished_run, tmp_path, monkeypatch):
    corpus_from(finished_run, tmp_path)
    assert run_here(small_flags(tmp_path), monkeypatch) == 0
    assert result(tmp_path / "run") == reference
    assert run_here(small_flags(tmp_path, seed=1, output_dir=tmp_path / "other"), monkeypatch) == 0
    assert result(tmp_path / "other")["hashes"] != reference["hashes"]


def test_held_out_text_without_a_token_to_mask_cannot_be_evaluated(tmp_path):
    run = Run(configure(), tmp_path)
    run.config = resolve(run.given)
    rows = np.array([[CLS_ID, UNK_ID, SEP_ID, PAD_ID]] * 3)
    with pytest.raises(Failed, match="the held-out text has no token to mask"):
        evaluate(Learner(noisy_model(), run.config, run.world), as_sequences(rows), run)


def test_overwrite_starts_again(finished_run, reference, tmp_path, monkeypatch):
    shutil.copytree(finished_run, tmp_path / "copy")
    flags = small_flags(tmp_path / "copy", n_layers=2)
    assert run_here([*flags, "--overwrite"], monkeypatch) == 0
    assert result(tmp_path / "copy" / "run")["hashes"] != reference["hashes"]
