"""Metrics that resume at the checkpoint, and the same values for TensorBoard if requested."""

import importlib.util
import json

import pytest
from configs import configure
from helpers import corpus_from, result, run_here, small_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from microbert.runtime.metrics import Metrics


def scalars(folder):
    """Return TensorBoard's values as (step, value) pairs, by name."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_metrics_after_the_checkpoint_are_removed_when_a_run_resumes(tmp_path):
    metrics = Metrics(tmp_path, 0, for_tensorboard=True)
    for step in (10, 20, 30):
        metrics.write({"step": step, "seconds": 1.0, "train/loss": float(step)})
    again = Metrics(tmp_path, 20, for_tensorboard=True)
    again.write({"step": 30, "seconds": 2.0, "train/loss": 31.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert scalars(tmp_path / "tensorboard") == {"train/loss": [(10, 10.0), (20, 20.0), (30, 31.0)]}


def test_tensorboard_gets_the_values_of_metrics_jsonl_and_changes_nothing_else(
    finished_run, reference, tmp_path, monkeypatch
):
    corpus_from(finished_run, tmp_path)
    assert run_here(small_flags(tmp_path, report_to="tensorboard"), monkeypatch) == 0
    assert result(tmp_path / "run") == reference
    found = scalars(tmp_path / "run" / "tensorboard")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    of_health = ("health/weights_rms", "health/attention_logit", "eval/loss_8", "eval/loss_at_max")
    for name in ("train/loss", "eval/loss", "train/learning_rate", *of_health, "by_length/loss_8"):
        assert found[name] == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line]
    assert run_here(small_flags(tmp_path, overwrite=True), monkeypatch) == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_tensorboard_without_its_package_is_refused_before_the_run(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    with pytest.raises(SystemExit) as stop:
        configure("--report-to", "tensorboard")
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        configure("--report-to", "wandb")
