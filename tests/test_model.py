"""The model: the same as transformers' BertForMaskedLM, and a start at unigram entropy."""

import math

import numpy as np
import pytest
import torch
import transformers
from models import VOCAB_SIZE, as_batch, noise_, noisy_bert, token_rows

from microbert.export import from_hugging_face, hugging_face_config, model_config, to_hugging_face
from microbert.loss import masked_scores
from microbert.masking import mask_batch
from microbert.model import Bert, ModelConfig, build_model, unigram_entropy
from microbert.tokenizer import N_SPECIAL, PAD_ID

TOLERANCE = 1e-4
SHAPES = [(1, 1, 4), (2, 2, 4), (3, 4, 32), (2, 3, 24)]  # layers, heads, width


def their_bert(config):
    return transformers.BertForMaskedLM(transformers.BertConfig(**hugging_face_config(config))).eval()


def tokens(padded):
    ids = torch.from_numpy(token_rows(6, seed=1, shortest=1 if padded else 14))
    assert (ids == PAD_ID).any() == padded
    return ids, ids != PAD_ID


@torch.no_grad()
def assert_same_logits(ours, theirs, padded):
    ids, real = tokens(padded)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    our_logits = ours.logits(ids, real if padded else None, positions).view(*ids.shape, -1)[real]
    their_logits = theirs(input_ids=ids, attention_mask=real.long()).logits[real]
    assert their_logits.std() > 0.1
    assert (our_logits - their_logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_layers, n_heads, n_embed", SHAPES)
def test_transformers_computes_the_same_from_our_weights(n_layers, n_heads, n_embed, padded):
    ours = noisy_bert(n_layers, n_heads, n_embed)
    theirs = their_bert(ours.config)
    missing, unexpected = theirs.load_state_dict(to_hugging_face(ours), strict=False)
    assert not unexpected and set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    theirs.tie_weights()
    assert_same_logits(ours, theirs, padded)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_layers, n_heads, n_embed", SHAPES)
def test_our_model_computes_the_same_from_the_weights_of_transformers(n_layers, n_heads, n_embed, padded):
    config = ModelConfig(VOCAB_SIZE, n_layers, n_heads, n_embed, 16)
    theirs, ours = noise_(their_bert(config), seed=1), Bert(config).eval()
    from_hugging_face(ours, theirs.state_dict())
    assert_same_logits(ours, theirs, padded)


def test_weights_go_to_hugging_face_and_back_unchanged():
    ours, copy = noisy_bert(seed=1), noisy_bert(seed=2)
    from_hugging_face(copy, to_hugging_face(ours))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), copy.parameters(), strict=True))


def test_the_shape_goes_to_hugging_face_and_back_unchanged():
    config = ModelConfig(vocab_size=77, n_layers=3, n_heads=4, n_embed=8, max_seq_len=21, dropout=0.1)
    assert model_config(hugging_face_config(config)) == config


def test_weights_of_another_shape_are_refused():
    with pytest.raises(RuntimeError, match="shape"):
        from_hugging_face(noisy_bert(max_seq_len=12), to_hugging_face(noisy_bert(max_seq_len=16)))
    with pytest.raises(KeyError):
        from_hugging_face(noisy_bert(n_layers=3), to_hugging_face(noisy_bert(n_layers=2)))


@torch.no_grad()
def test_only_the_asked_positions_are_computed_in_the_order_asked():
    model, (ids, real) = noisy_bert(), tokens(padded=True)
    everywhere = model.logits(ids, real, torch.arange(16).expand(6, 16)).view(6, 16, -1)
    positions = torch.randint(0, 16, (6, 5), generator=torch.Generator().manual_seed(0))
    asked = model.logits(ids, real, positions).view(6, 5, -1)
    assert torch.allclose(asked, torch.take_along_dim(everywhere, positions[:, :, None], dim=1), atol=1e-5)


@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing():
    model, (ids, real) = noisy_bert(), tokens(padded=True)
    positions = torch.arange(16).expand(6, 16)
    other = torch.where(real, ids, torch.randint_like(ids, N_SPECIAL, VOCAB_SIZE))
    before, after = (model.logits(x, real, positions).view(6, 16, -1) for x in (ids, other))
    assert torch.equal(before[real], after[real])
    assert not torch.equal(before, after)
    assert not torch.allclose(before[real], model.logits(other, None, positions).view(6, 16, -1)[real], atol=1e-3)  # the mask did it


def zipf_counts(vocab_size=VOCAB_SIZE):
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    counts[N_SPECIAL:] = (1e6 / torch.arange(1, vocab_size - N_SPECIAL + 1)).long()
    return counts


def test_the_output_bias_starts_at_the_unigram_distribution():
    counts = zipf_counts()
    bias = build_model(ModelConfig(VOCAB_SIZE, 1, 2, 4, 16), 0, counts).output_bias
    assert torch.isfinite(bias).all()  # also for tokens that never occur
    assert torch.allclose(bias.softmax(dim=0), counts / counts.sum(), atol=1e-6, rtol=1e-4)


def test_the_first_loss_is_the_unigram_entropy():
    counts = zipf_counts()
    share = (counts / counts.sum()).numpy()
    rows = token_rows(2000, shortest=14)
    rows[:, 1:15] = np.random.default_rng(0).choice(VOCAB_SIZE, (2000, 14), p=share / share.sum())
    masked = mask_batch(as_batch(rows), seed=0, probability=0.5, vocab_size=VOCAB_SIZE)
    model = build_model(ModelConfig(VOCAB_SIZE, 2, 2, 4, 16), 0, counts).eval()
    hidden = model(torch.from_numpy(masked.input_ids), None, torch.from_numpy(masked.positions))
    loss, _ = masked_scores(hidden, model.output_weight, model.output_bias, torch.from_numpy(masked.labels).reshape(-1))
    entropy = unigram_entropy(counts)
    assert entropy < math.log(VOCAB_SIZE) - 0.5
    assert loss / masked.n_masked == pytest.approx(entropy, abs=0.05)


def test_unigram_entropy_is_that_of_the_shares():
    assert unigram_entropy(torch.tensor([0, 0, 3, 3, 3, 3])) == pytest.approx(math.log(4))
    assert unigram_entropy(torch.tensor([0, 1, 3])) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_the_weights_are_a_function_of_the_seed():
    def weights(seed):
        torch.rand(1)  # the global generator has no part in it
        return list(build_model(ModelConfig(VOCAB_SIZE, 2, 2, 4, 16), seed).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(3), weights(3), strict=True))
    different = [not torch.equal(a, b) for a, b in zip(weights(3), weights(4), strict=True) if a.ndim == 2]
    assert all(different) and different
