"""A new model depends on the seed only, and starts at unigram entropy."""

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from configs import configure, resolve
from hypothesis import given
from hypothesis import strategies as st
from models import VOCAB_SIZE, as_batch, few_examples, noisy_model, token_rows

from microbert.data.masking import mask_batch
from microbert.data.tokenizer import N_SPECIAL
from microbert.errors import InputError
from microbert.model.build import (
    build_model,
    count_parameters,
    create_model,
    new_model,
    unigram_entropy,
    with_max_seq_len,
)
from microbert.model.layers import ModelConfig
from microbert.model.loss import masked_scores
from microbert.runtime.run import Run
from microbert.train.optim import Optimizer


def zipf_counts(vocab_size=VOCAB_SIZE):
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    counts[N_SPECIAL:] = (1e6 / torch.arange(1, vocab_size - N_SPECIAL + 1)).long()
    return counts


def test_the_output_bias_starts_at_the_unigram_distribution():
    counts = zipf_counts()
    bias = build_model(ModelConfig(VOCAB_SIZE, 1, 2, 4, 16), 0, counts).output_bias
    assert torch.isfinite(bias).all()  # including tokens that never occur
    assert torch.allclose(bias.softmax(dim=0), counts / counts.sum(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("arch", ["bert", "modern"])
def test_the_first_loss_is_the_unigram_entropy(arch):
    counts = zipf_counts()
    share = (counts / counts.sum()).numpy()
    rows = token_rows(2000, shortest=14)
    rows[:, 1:15] = np.random.default_rng(0).choice(VOCAB_SIZE, (2000, 14), p=share / share.sum())
    masked = mask_batch(as_batch(rows), seed=0, probability=0.5, vocab_size=VOCAB_SIZE)
    model = build_model(ModelConfig(VOCAB_SIZE, 2, 2, 4, 16, arch=arch), 0, counts).eval()
    hidden = model(torch.from_numpy(masked.input_ids), None, torch.from_numpy(masked.positions))
    loss, _ = masked_scores(hidden, model.output_weight, model.output_bias, torch.from_numpy(masked.labels).reshape(-1))
    entropy = unigram_entropy(counts)
    assert entropy < math.log(VOCAB_SIZE) - 0.5
    assert loss / masked.n_masked == pytest.approx(entropy, abs=0.05)


def test_unigram_entropy_is_that_of_the_shares():
    assert unigram_entropy(torch.tensor([0, 0, 3, 3, 3, 3])) == pytest.approx(math.log(4))
    assert unigram_entropy(torch.tensor([0, 1, 3])) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


@pytest.mark.parametrize("arch", ["bert", "modern"])
def test_the_weights_are_a_function_of_the_seed(arch):
    def weights(seed):
        torch.rand(1)  # the global generator must not matter
        return list(build_model(ModelConfig(VOCAB_SIZE, 2, 2, 4, 16, arch=arch), seed).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(3), weights(3), strict=True))
    different = [not torch.equal(a, b) for a, b in zip(weights(3), weights(4), strict=True) if a.ndim == 2]
    assert all(different) and different


@few_examples
@given(
    heads=st.integers(1, 4),
    half=st.integers(1, 4),
    layers=st.integers(1, 4),
    vocab_size=st.integers(6, 500),
    arch=st.sampled_from(["bert", "modern"]),
)
def test_parameters_are_counted_without_allocating_a_model(heads, half, layers, vocab_size, arch):
    config = ModelConfig(vocab_size, layers, heads, 2 * heads * half, 16, arch=arch)
    assert count_parameters(config) == sum(parameter.numel() for parameter in new_model(config).parameters())


@pytest.mark.parametrize("arch", ["bert", "modern"])
def test_a_model_with_fewer_positions_computes_the_same(arch):
    model = build_model(ModelConfig(VOCAB_SIZE, 2, 2, 4, 16, arch=arch), 0).eval()
    shorter = with_max_seq_len(model, 6).eval()
    input_ids = torch.from_numpy(token_rows(3, shortest=6)[:, :6].astype(np.int64))
    assert shorter.config.max_seq_len == 6 and with_max_seq_len(model, None) is model is with_max_seq_len(model, 16)
    assert torch.equal(shorter.hidden_states(input_ids, None, None), model.hidden_states(input_ids, None, None))


def test_more_positions_than_a_model_has_weights_for_are_refused():
    with pytest.raises(InputError, match="16 positions"):
        with_max_seq_len(build_model(ModelConfig(VOCAB_SIZE, 1, 2, 4, 16), 0), 17)


def test_a_run_prints_the_size_of_its_model(capsys):
    config = configure(n_layers=1, n_heads=2, n_embed=4)
    tokens = types.SimpleNamespace(token_counts=zipf_counts().numpy())
    run = Run(config, Path("unused"))
    run.config = resolve(config)
    model = create_model(run, tokens, torch.device("cpu"))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert capsys.readouterr().out == f"model: 1 layer, 2 heads, 4-dim, {n_parameters:,} parameters\n"


@pytest.mark.parametrize("arch", ["bert", "modern"])
def test_moments_have_the_names_of_earlier_checkpoints(arch):
    """Earlier models had the matrices of the feed-forward in the layer itself."""
    optimizer = Optimizer(noisy_model(n_layers=1, arch=arch), configure(optimizer="muon"))
    optimizer.begin_after(1)
    names = {name for name in optimizer.tensors() if ".layers." in name and "norm" not in name}
    matrices = ["attention.query_key_value", "attention.output", "expand", "contract"]
    expected = {f"momentum.layers.0.{name}.weight" for name in matrices}
    if arch == "bert":
        expected |= {f"{kind}.layers.0.{name}.bias" for kind in ("exp_avg", "exp_avg_sq") for name in matrices}
    assert names == expected
