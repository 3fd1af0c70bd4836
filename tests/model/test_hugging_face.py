"""Both architectures compute the logits of transformers from the same weights, converted in both directions."""

import pytest
import torch
import transformers
from models import VOCAB_SIZE, noise_, noisy_model, token_rows

from microbert.data.tokenizer import PAD_ID
from microbert.model.build import ARCHITECTURES, new_model
from microbert.model.hugging_face import (
    from_hugging_face,
    hugging_face_config,
    read_hugging_face_config,
    to_hugging_face,
)
from microbert.model.layers import ModelConfig

TOLERANCE = 1e-4
SHAPES = [(1, 1, 4), (2, 2, 4), (3, 4, 32), (2, 3, 24)]  # layers, heads, width
ARCHS = tuple(ARCHITECTURES)


def their_model(config):
    stored = hugging_face_config(config)
    model = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model(**stored)).eval()
    assert type(model).__name__ == stored["architectures"][0]
    return model


@torch.no_grad()
def assert_same_logits(ours, theirs, padded, max_seq_len=16):
    ids = torch.from_numpy(token_rows(6, max_seq_len, seed=1, shortest=1 if padded else max_seq_len - 2))
    real = ids != PAD_ID
    assert real.all() or padded
    positions = torch.arange(max_seq_len).expand(ids.shape)
    our_logits = ours.logits(ids, real if padded else None, positions).view(*ids.shape, -1)[real]
    their_logits = theirs(input_ids=ids, attention_mask=real.long()).logits[real]
    assert their_logits.std() > 0.1
    assert (our_logits - their_logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_layers, n_heads, n_embed", SHAPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_transformers_computes_the_same_from_our_weights(arch, n_layers, n_heads, n_embed, padded):
    ours = noisy_model(n_layers, n_heads, n_embed, arch=arch)
    theirs = their_model(ours.config)
    missing, unexpected = theirs.load_state_dict(to_hugging_face(ours), strict=False)
    assert not unexpected and all("decoder" in name for name in missing)  # tied
    theirs.tie_weights()
    assert_same_logits(ours, theirs, padded)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_layers, n_heads, n_embed", SHAPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_our_model_computes_the_same_from_the_weights_of_transformers(arch, n_layers, n_heads, n_embed, padded):
    config = ModelConfig(VOCAB_SIZE, n_layers, n_heads, n_embed, 16, arch=arch)
    theirs, ours = noise_(their_model(config), seed=1), new_model(config).eval()
    from_hugging_face(ours, theirs.state_dict())
    assert_same_logits(ours, theirs, padded)


@pytest.mark.parametrize("arch", ARCHS)
def test_transformers_computes_the_same_at_every_length(arch):
    ours = noisy_model(n_embed=16, arch=arch)
    theirs = their_model(ours.config)
    theirs.load_state_dict(to_hugging_face(ours), strict=False)
    theirs.tie_weights()
    for length in range(3, 17):
        assert_same_logits(ours, theirs, padded=True, max_seq_len=length)


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_go_to_hugging_face_and_back_unchanged(arch):
    ours, copy = (noisy_model(seed=seed, arch=arch) for seed in (1, 2))
    from_hugging_face(copy, to_hugging_face(ours))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), copy.parameters(), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_shape_goes_to_hugging_face_and_back_unchanged(arch):
    config = ModelConfig(vocab_size=77, n_layers=3, n_heads=4, n_embed=8, max_seq_len=21, dropout=0.1, arch=arch)
    assert read_hugging_face_config(hugging_face_config(config)) == config


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="roberta"):
        read_hugging_face_config({"model_type": "roberta"})


def test_weights_of_another_shape_or_architecture_are_refused():
    with pytest.raises(RuntimeError, match="shape"):
        from_hugging_face(noisy_model(max_seq_len=12), to_hugging_face(noisy_model(max_seq_len=16)))
    for other in (noisy_model(n_layers=3), noisy_model(arch="modern")):
        with pytest.raises(KeyError):
            from_hugging_face(other, to_hugging_face(noisy_model(n_layers=2)))
