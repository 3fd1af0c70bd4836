"""The plots show the attention, embeddings and losses of a run's folder."""

import json
import shutil

import numpy as np
import pytest
from helpers import run_module
from models import noisy_model

from microbert.errors import InputError
from microbert.fill_mask import load_run
from microbert.model.export import save_model
from microbert.plot import _planes, draw_attention, draw_curves, draw_embeddings


@pytest.fixture(params=["bert", "modern"])
def folder(request, finished_run, tmp_path):
    """Return a run's folder with a model of two layers and two heads."""
    _, tokenizer = load_run(finished_run / "run")
    model = noisy_model(
        vocab_size=tokenizer.get_vocab_size(), n_layers=2, n_heads=2, n_embed=8, max_seq_len=32, arch=request.param
    )
    save_model(model, tokenizer, tmp_path)
    return tmp_path


def test_each_heads_attention_of_a_token_sums_to_one(folder):
    heads = [axes for axes in draw_attention(folder, "a great film .").axes if axes.images]
    shares = [axes.images[0].get_array().data for axes in heads]
    assert len(shares) == 4 and len({share.tobytes() for share in shares}) == 4
    for share in shares:
        assert share.shape[0] == share.shape[1] >= 6 and share.min() >= 0
        np.testing.assert_allclose(share.sum(axis=1), 1, rtol=1e-5)
    assert [label.get_text() for label in heads[0].get_yticklabels()][:2] == ["[CLS]", "a"]


def test_a_text_that_is_too_long_is_refused(folder):
    with pytest.raises(InputError, match="tokens"):
        draw_attention(folder, "film " * 100)


def test_embeddings_are_labelled_with_their_words(folder):
    [axes] = draw_embeddings(folder).axes
    words = [annotation.get_text() for annotation in axes.texts]
    assert len(words) == len(set(words)) > 20 and not any(word.startswith(("##", "[")) for word in words)


@pytest.mark.parametrize("n_embed", [2, 3, 4])
def test_up_to_four_dimensions_are_shown_in_pairs(n_embed):
    vectors = np.random.default_rng(0).normal(size=(9, n_embed))
    shown = np.concatenate([points for points, _ in _planes(vectors)], axis=1)
    np.testing.assert_array_equal(shown[:, :n_embed], vectors)


def test_more_dimensions_are_projected_on_the_plane_of_largest_variance():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(16, 2)))[0].T
    inside = rng.normal(size=(50, 2)) * (5, 2)
    [(points, labels)] = _planes(inside @ directions + 3.0 + 0.01 * rng.normal(size=(50, 16)))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.testing.assert_allclose(distances, np.linalg.norm(inside[:, None] - inside[None], axis=2), atol=0.2)
    assert "principal component 1" in labels[0]


def test_curves_show_the_metrics(finished_run):
    figure = draw_curves([finished_run / "run"])
    lines = [json.loads(line) for line in (finished_run / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    for axes, key, unit in zip(figure.axes, ("step", "tokens", "seconds"), (1, 1e6, 60), strict=True):
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), losses)
        np.testing.assert_allclose(
            axes.lines[0].get_xdata(), [line[key] / unit for line in lines if "eval/loss" in line]
        )


@pytest.mark.slow
def test_the_command_writes_images(finished_run, tmp_path):
    shutil.copytree(finished_run / "run", tmp_path / "other")
    done = run_module(
        "plot", str(finished_run / "run"), str(tmp_path / "other"), "--output-dir", str(tmp_path / "plots")
    )
    assert done.returncode == 0, done.stderr
    names = {"curves.png", *(f"{kind}-{run}.png" for kind in ("attention", "embeddings") for run in ("run", "other"))}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names
    assert all(
        path.read_bytes().startswith(b"\x89PNG") and str(path) in done.stdout for path in (tmp_path / "plots").iterdir()
    )


@pytest.mark.parametrize(
    "missing, message",
    [("metrics.jsonl", "evaluations"), ("config.json", "no model"), ("model.safetensors", "cannot be loaded")],
)
@pytest.mark.slow
def test_a_missing_file_is_reported_and_nothing_is_written(missing, message, finished_run, tmp_path):
    shutil.copytree(finished_run / "run", tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    done = run_module("plot", str(tmp_path / "run"), "--output-dir", str(tmp_path / "plots"))
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and message in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "plots").exists()
