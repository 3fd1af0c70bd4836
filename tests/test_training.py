"""What a run learns, and what it warns of."""

import json
import math

import pytest
from helpers import run_here, small_flags

from microbert.tokens import prepare_tokens


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["eval/loss"] for line in lines if "eval/loss" in line]


def alternating_corpus(folder):
    """Text in which each word follows from its neighbours: three words in a fixed round."""
    words = ["alpha", "beta", "gamma"]
    lines = [json.dumps({"text": " ".join(words[(start + i) % 3] for i in range(25 + start % 4))}) for start in range(300)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))


def test_a_run_learns_what_there_is_to_learn(tmp_path, monkeypatch, capfd):
    alternating_corpus(tmp_path)
    flags = small_flags(tmp_path, n_embed=16, n_layers=2, epochs=60, vocab_size=40, eval_every=500, save_every=1000)
    assert run_here(flags, monkeypatch) == 0
    losses = evaluations(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(3), abs=0.1)  # three equally frequent words: unigram entropy
    assert losses[-1] < 0.3
    assert "warning" not in capfd.readouterr().out


def test_a_rate_at_which_nothing_can_be_learnt_is_warned_of(tmp_path, monkeypatch, capfd):
    alternating_corpus(tmp_path)
    assert run_here([*small_flags(tmp_path), "--lr-scaling", "none"], monkeypatch) == 0
    out = capfd.readouterr().out
    assert "cannot learn" in out and 'lr_scaling = "auto"' in out
    assert "no better than guessing by word frequency" in out


def test_a_stop_during_preparation_exits_with_75_and_the_same_command_goes_on(tmp_path, monkeypatch, capfd):
    import os
    import signal

    import microbert.tokens

    def preparing(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return prepare_tokens(*arguments)

    monkeypatch.setattr(microbert.tokens, "prepare_tokens", preparing)
    assert run_here(small_flags(tmp_path), monkeypatch) == 75
    assert "Traceback" not in capfd.readouterr().err
    monkeypatch.undo()
    assert run_here(small_flags(tmp_path), monkeypatch) == 0


def test_a_stop_during_evaluation_repeats_it_after_the_restart(tmp_path, monkeypatch, reference, finished_run):
    import os
    import shutil
    import signal

    import microbert.training
    from helpers import result

    shutil.copy(finished_run / "corpus.jsonl", tmp_path)
    real = microbert.training.masked_scores
    calls = 0

    def scores(*arguments):
        nonlocal calls
        calls += 1
        if calls == 6:  # in the middle of the second evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(microbert.training, "masked_scores", scores)
    assert run_here(small_flags(tmp_path), monkeypatch) == 75
    monkeypatch.undo()
    assert run_here(small_flags(tmp_path), monkeypatch) == 0
    assert result(tmp_path / "run") == reference


def test_torchrun_is_refused_by_a_version_of_one_process(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_here(small_flags(tmp_path), monkeypatch) == 2
    assert "not with torchrun" in capfd.readouterr().err
