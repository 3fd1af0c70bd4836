"""What a run sees of its model at each evaluation, and what it warns about."""

import dataclasses
import json
import time
import types

import numpy as np
import pytest
import torch
from configs import configure, resolve
from helpers import run_here, small_flags
from models import VOCAB_SIZE, noisy_model

import microbert.train.loop
from microbert.data.tokenizer import N_SPECIAL, PAD_ID
from microbert.model.health import WeightsRms
from microbert.train.by_length import AT_THE_END, loss_by_length
from microbert.train.health_check import LARGE_WEIGHTS, Health, HealthCheck, largest_healthy_rms

NAMES = ("health/weights_rms", "health/embeddings_rms", "health/attention_logit", "eval/loss_8", "eval/loss_at_max")


def tokens_of(*lengths):
    """Return prepared tokens whose held-out documents have so many ids."""
    rows = np.full((len(lengths), 510), PAD_ID, np.uint16)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = N_SPECIAL + np.arange(length) % (VOCAB_SIZE - N_SPECIAL)
    counts = types.SimpleNamespace(bits_per_byte=lambda loss: loss)
    return types.SimpleNamespace(held_out_documents=rows, token_counts=np.arange(VOCAB_SIZE), corpus_counts=counts)


def check_of(tokens, within_memory=lambda work: work(), max_seq_len=32, positions=64, **constants):
    config = resolve(configure(max_seq_len=max_seq_len, n_embed=8, n_heads=2, **constants))
    sizes = types.SimpleNamespace(evaluation=4, within_memory=within_memory)
    return HealthCheck(noisy_model(max_seq_len=positions), config, tokens, sizes)


def health(largest=0.1, logit=10.0, short=4.0, long=3.9):
    return Health(WeightsRms(0.2, 0.05, largest), logit, short, long)


def test_it_looks_at_the_shortest_length_and_at_that_of_the_training_rows():
    check = check_of(tokens_of(*[200] * 30))
    assert set(check._chosen) == {8, 32}  # not 64, which the model could read
    found = check.look()
    assert set(found.metrics()) == set(NAMES)
    assert found.short_loss != found.long_loss and found == check.look()


@pytest.mark.parametrize("lengths, missing", [([], {2, 3, 4}), ([8] * 3, {4}), ([5], {2, 3, 4})])
def test_figures_without_a_document_are_left_out(lengths, missing):
    metrics = check_of(tokens_of(*lengths)).look().metrics()
    assert set(metrics) == {name for number, name in enumerate(NAMES) if number not in missing}


def test_a_figure_that_is_not_finite_is_left_out():
    assert "health/attention_logit" not in dataclasses.replace(health(), attention_logit=float("inf")).metrics()


def test_without_memory_there_is_no_figure():
    assert check_of(tokens_of(*[200] * 3), within_memory=lambda work: None).look() is None


@pytest.mark.parametrize("n_documents", [3, 300])
def test_the_estimate_of_the_table_is_about_what_it_takes(n_documents):
    check = check_of(tokens_of(*[200] * n_documents))
    look_seconds, table_seconds = check.estimate()
    start = time.perf_counter()
    loss_by_length(check._model, check._text, AT_THE_END, seed=42, batch_tokens=4 * 32)
    seconds = time.perf_counter() - start
    assert look_seconds > 0 and seconds / 20 < table_seconds < 5 * seconds  # the machine may be busy
    assert check_of(tokens_of()).estimate()[1] == 0.0


@pytest.mark.parametrize(
    "found, words",
    [
        (health(), None),
        (health(largest=1.1), None),
        (health(largest=1.2), "weight_decay, such as 0.1"),
        (health(logit=999.0), None),
        (health(logit=1001.0), "attention logits"),
        (health(short=4.8), None),
        (health(short=5.0), "short texts"),
        (health(logit=None, short=None, long=None), None),
    ],
)
def test_each_fault_is_warned_about_once(found, words):
    check = check_of(tokens_of(*[200] * 3), weight_decay=0.01)  # 8 dimensions: 1.13 is too large
    texts = check.warnings(found, is_warmed_up=True)
    assert len(texts) == (words is not None) and all(words in text and text.startswith("warning: ") for text in texts)
    assert check.warnings(found, is_warmed_up=True) == []


def test_short_texts_may_be_worse_in_the_warm_up():
    check = check_of(tokens_of(*[200] * 3))
    assert check.warnings(health(short=5.0), is_warmed_up=False) == []
    assert len(check.warnings(health(short=5.0), is_warmed_up=True)) == 1


def test_the_limit_separates_the_runs_that_were_brittle():
    """Figures of shared notes: 64 dimensions, 11,500 steps; and v4 after 20 minutes."""
    assert 0.16 < largest_healthy_rms(64) < 0.43 and largest_healthy_rms(128) > 0.24
    assert largest_healthy_rms(4) == LARGE_WEIGHTS / 2


def test_every_evaluation_of_a_run_has_the_figures(finished_run):
    lines = [json.loads(line) for line in (finished_run / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert len(evaluations) > 2
    for line in evaluations:
        assert set(NAMES) <= line.keys()
        assert line["eval/loss_8"] == pytest.approx(line["eval/loss"], abs=2)
    assert evaluations[0]["health/weights_rms"] == pytest.approx(0.02, rel=0.3)  # the initial standard deviation
    assert evaluations[0]["health/embeddings_rms"] != evaluations[-1]["health/embeddings_rms"]


def test_a_run_prints_a_warning_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(microbert.train.loop.HealthCheck, "look", lambda self: health(logit=1234.0))
    assert run_here(small_flags(tmp_path, eval_every=5, epochs=1), monkeypatch) == 0
    assert capfd.readouterr().out.count("the largest is 1234") == 1


def test_looking_changes_no_weight_and_no_random_number():
    check = check_of(tokens_of(*[200] * 30))
    before, state = [parameter.clone() for parameter in check._model.parameters()], torch.get_rng_state()
    check.look()
    assert all(map(torch.equal, before, check._model.parameters())) and torch.equal(state, torch.get_rng_state())
