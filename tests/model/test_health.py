"""The size of weights and attention logits."""

import pytest
import torch
import transformers
from models import noisy_model, token_rows

from microbert.model.health import LOGIT_ROWS, largest_attention_logit, weights_rms
from microbert.model.hugging_face import hugging_face_config, to_hugging_face


def ids(n=LOGIT_ROWS + 3):
    return torch.from_numpy(token_rows(n, 16, shortest=14))


@pytest.mark.parametrize("arch", ["bert", "modern"])
def test_the_rms_is_that_of_each_matrix(arch):
    model = noisy_model(arch=arch)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.fill_(0.5)
        model.layers[1].attention.query_key_value.weight[8:16] = 3.0  # the keys
        model.layers[0].feed_forward.contract.weight.fill_(-0.25)
        model.output_weight.fill_(2.0)
        model.head.transform.weight.fill_(9.0)  # of no layer
    found = weights_rms(model)
    assert (found.embeddings, found.smallest, found.largest) == pytest.approx((2.0, 0.25, 3.0))


def test_the_largest_logit_is_that_of_transformers():
    """Stock eager attention: its softmax's arguments are recovered from the probabilities up to a constant of a row."""
    model = noisy_model(n_layers=1, arch="bert")
    stock = transformers.BertForMaskedLM(transformers.BertConfig(**hugging_face_config(model.config)))
    stock.load_state_dict(to_hugging_face(model), strict=False)
    layer = stock.eval().bert.encoder.layer[0].attention.self
    with torch.no_grad():
        hidden = stock.bert.embeddings(ids())
        query, key = (part(hidden).view(len(hidden), 16, 2, 4).transpose(1, 2) for part in (layer.query, layer.key))
        expected = (query @ key.transpose(2, 3) / 4**0.5).abs().max()
    assert largest_attention_logit(model, ids()) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_rotary_positions_enter_the_logits():
    model = noisy_model(n_layers=1, arch="modern")
    attention = model.layers[0].attention
    x = model.embeddings(ids(1), None)
    query, key = (x @ attention.query_key_value.weight[rows].T for rows in (slice(0, 8), slice(8, 16)))
    query, key = (attention.rotary(part.view(1, 16, 2, 4)).transpose(1, 2) for part in (query, key))
    expected = (query @ key.transpose(2, 3)).abs().max() / 4**0.5
    assert largest_attention_logit(model, ids(1)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("arch", ["bert", "modern"])
def test_a_large_logit_in_any_layer_and_sequence_is_found_and_the_model_does_not_change(arch, layer):
    model = noisy_model(arch=arch)
    before = largest_attention_logit(model, ids())
    each = [largest_attention_logit(model, row[None]) for row in ids()]
    assert before == pytest.approx(max(each), rel=1e-5)
    logits = model.logits(ids(), None, torch.ones(len(ids()), 1, dtype=torch.long))
    assert torch.equal(logits, model.logits(ids(), None, torch.ones(len(ids()), 1, dtype=torch.long)))
    assert not any(one.attention._forward_pre_hooks for one in model.layers)
    with torch.no_grad():
        model.layers[layer].attention.query_key_value.weight[:16] *= 100
    assert largest_attention_logit(model, ids()) > 50 * before
