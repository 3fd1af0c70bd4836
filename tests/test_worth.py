"""benchmarks/worth.py: each seed draws its labelled reviews, and the table has the results of one call alone."""

import argparse
import importlib
import json

import numpy as np
import pytest
from helpers import ROOT
from models import noisy_model, token_rows

from microbert.data.labelled import LabelledTexts
from microbert.errors import InputError
from microbert.train.finetuning import LabelledRows

N_TEXTS = 40
ACCURACIES = {"pretrained": {42: 0.9, 43: 0.8, 44: 0.7}, "random weights": {42: 0.8, 43: 0.75, 44: 0.65}}


@pytest.fixture
def worth(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("worth")


@pytest.fixture
def trained(worth, monkeypatch):
    """Replace the trainings by a record of their reviews and seeds, and their accuracies by ACCURACIES."""
    seen = []

    def encode(tokenizer, texts, length):
        rows = token_rows(len(texts.texts), shortest=3).astype(np.int32)
        rows[:, 1] = [10 + int(text) for text in texts.texts]
        return LabelledRows(rows, texts.labels)

    def train(model, texts, settings, description):
        weights = "pretrained" if "pretrained" in description else "random weights"
        model.accuracy = ACCURACIES[weights][settings.seed]
        seen.append((weights, settings.seed, frozenset(texts.rows[:, 1] - 10)))
        return 7

    names = list(map(str, range(N_TEXTS)))
    texts = LabelledTexts(names, np.arange(N_TEXTS) % 2, ["no", "yes"])
    monkeypatch.setattr(worth, "read_labelled", lambda *arguments, **named: texts)
    monkeypatch.setattr(worth, "held_out", lambda texts, folder: np.arange(N_TEXTS) >= 30)
    monkeypatch.setattr(worth, "load_run", lambda folder: (noisy_model(), None))
    monkeypatch.setattr(worth, "encode_labelled", encode)
    monkeypatch.setattr(worth, "train_classifier", train)
    monkeypatch.setattr(worth, "right_answers", lambda model, texts, size: np.array([model.accuracy]))
    monkeypatch.setattr(worth, "tf_idf_answers", lambda train, test: np.array([len(set(train.texts) & {"0"})]))
    return seen


def arguments(tmp_path, **changed):
    given = dict(labels=[10, None], seeds=3, epochs=1, learning_rate=5e-5, max_seq_len=None, shrink=1.0)
    given |= dict(adversarial=None, choosing=False, json=tmp_path / "worth.json", folders=[tmp_path])
    return argparse.Namespace(**given | changed)


def table_of(worth, given, capsys):
    """Return the table that a call prints, without what it prints before."""
    worth.compare(given)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


def test_each_seed_draws_its_labels_for_every_model(worth, trained, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    lines = table_of(worth, arguments(tmp_path), capsys)
    drawn = {(weights, seed): reviews for weights, seed, reviews in trained if len(reviews) == 10}
    assert len(trained) == 12 and len(drawn) == 6 and all(reviews < set(range(30)) for reviews in drawn.values())
    for seed in (42, 43, 44):
        assert drawn["pretrained", seed] == drawn["random weights", seed]
    assert len({drawn["pretrained", seed] for seed in (42, 43, 44)}) == 3
    results = json.loads((tmp_path / "worth.json").read_text())["results"]
    of_tf_idf = [one for one in results if one["weights"] == "tf-idf"]
    assert [(one["labels"], one["seed"]) for one in of_tf_idf] == [(10, 42), (10, 43), (10, 44), (30, 42)]
    assert [one["accuracy"] for one in of_tf_idf[:3]] == [0 in drawn["pretrained", seed] for seed in (42, 43, 44)]
    assert lines[2].endswith("pretrained | 80.0 % (90.0 80.0 70.0) | 80.0 % (90.0 80.0 70.0) |")
    # differences of 10, 5 and 5 points: a standard deviation of 2.89, over the root of three
    assert lines[4].split("|")[2:4] == [" +6.7 \u00b1 1.7 "] * 2


@pytest.mark.parametrize("changed", ["weights", "settings", "tokens", "seeds", "nothing"])
def test_the_table_has_the_results_of_this_call_alone(worth, trained, changed, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    table_of(worth, arguments(tmp_path), capsys)
    known = len(trained)
    for accuracies in ACCURACIES.values():
        for seed in accuracies:
            monkeypatch.setitem(accuracies, seed, 0.5)
    if changed == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"others")
    other = {"settings": dict(epochs=2), "tokens": dict(max_seq_len=8), "seeds": dict(seeds=1)}.get(changed, {})
    lines = table_of(worth, arguments(tmp_path, **other), capsys)
    if changed in ("seeds", "nothing"):  # found, and not measured again
        assert len(trained) == known
        found = {"seeds": "90.0 %", "nothing": "80.0 % (90.0 80.0 70.0)"}[changed]
    else:
        assert len(trained) == 2 * known
        found = "50.0 % (50.0 50.0 50.0)"
    assert lines[2].endswith(f"pretrained | {found} | {found} |")
    if changed == "seeds":
        assert lines[4].split("|")[2:4] == [" +10.0 "] * 2
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    n_trained, lines = len(trained), table_of(worth, arguments(tmp_path), capsys)
    found = "80.0 % (90.0 80.0 70.0)"  # as at first, and not what was measured last
    assert len(trained) == n_trained and lines[2].endswith(f"pretrained | {found} | {found} |")


def test_tf_idf_is_measured_again_on_other_test_reviews(worth, trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    table_of(worth, arguments(tmp_path), capsys)
    (tmp_path / "model.safetensors").write_bytes(b"others")
    monkeypatch.setattr(worth, "held_out", lambda texts, folder: np.arange(N_TEXTS) < 10)
    monkeypatch.setattr(worth, "tf_idf_answers", lambda train, test: np.array([0.25]))
    assert table_of(worth, arguments(tmp_path), capsys)[-1].endswith("| 25.0 % (25.0 25.0 25.0) | 25.0 % |")


def test_results_of_another_version_are_not_mixed_in(worth, trained, tmp_path):
    (tmp_path / "worth.json").write_text(json.dumps({"results": []}))
    with pytest.raises(InputError, match="another version"):
        worth.compare(arguments(tmp_path))
    (tmp_path / "worth.json").write_text("[]")
    with pytest.raises(InputError, match="does not hold results"):
        worth.compare(arguments(tmp_path))
