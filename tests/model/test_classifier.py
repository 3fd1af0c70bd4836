"""The classifier computes the logits of the stock class of transformers, from the ids of the stock tokenizer."""

import numpy as np
import pytest
import torch
import transformers
from models import noise_, noisy_model, token_rows

from microbert.fill_mask import load_run
from microbert.model.classifier import TextClassifier, batch_of, check_classifier, encode_texts, save_classifier

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(finished_run):
    return load_run(finished_run / "run")[1]


@pytest.fixture(params=["bert", "modern"])
def model(request, tokenizer):
    encoder = noisy_model(arch=request.param, n_layers=3, n_embed=16, vocab_size=tokenizer.get_vocab_size())
    return noise_(TextClassifier(encoder, 3, seed=0))


def test_the_stock_class_gives_the_same_logits(model, tokenizer, tmp_path):
    save_classifier(model, tokenizer, ["bad", "fair", "good"], tmp_path)
    rows = token_rows(20)
    assert check_classifier(model, rows, tmp_path) < 1e-5
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "bad", 1: "fair", 2: "good"} and loaded.config.num_labels == 3
    with torch.no_grad():
        model.classifier.bias[1] += 0.1
    with pytest.raises(RuntimeError, match="differ"):
        check_classifier(model, rows, tmp_path)


@torch.no_grad()
def test_padding_does_not_change_a_texts_logits(model):
    rows = token_rows(6)
    together = model(batch_of(rows, CPU))
    alone = torch.cat([model(batch_of(row[None], CPU)) for row in rows])
    assert together.shape == (6, 3)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_texts_have_the_ids_of_the_stock_tokenizer(tokenizer, finished_run):
    texts = [
        "",
        "great film",
        "a [PAD] b [PAD]",
        "the [MASK] was\x00 slow , never bad ! " * 9,
        "\u00fcber caf\u00e9",
        *(finished_run / "corpus.jsonl").read_text().splitlines()[:50],
    ]
    stock = transformers.AutoTokenizer.from_pretrained(finished_run / "run", model_max_length=16)
    expected = stock(texts, truncation=True, padding="max_length", return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(encode_texts(tokenizer, texts, 16), expected)


def test_the_new_weights_are_a_function_of_the_seed():
    first, same, other = (TextClassifier(noisy_model(), 2, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {
        "classifier.weight",
        "pooler.weight",
    }


def test_dropout_needs_keys():
    model, rows = TextClassifier(noisy_model(dropout=0.5), 2, seed=0), batch_of(token_rows(4), CPU)
    plain, again, dropped = model(rows), model(rows), model(rows, torch.arange(4))
    assert torch.equal(plain, again) and not torch.equal(plain, dropped)
