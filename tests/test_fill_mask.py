"""Untrusted run folders are loaded with little memory and time, or refused in one line."""

import json
import math

import pytest
import torch
from models import noisy_model
from safetensors.torch import load_file, save_file

from microbert.data.fast_encode import Encoder
from microbert.data.tokenizer import train_tokenizer
from microbert.errors import InputError
from microbert.fill_mask import fill_mask, load_run
from microbert.model.export import save_model
from microbert.model.layers import TABLE_NUMBERS
from microbert.plot import draw_attention, draw_curves, draw_embeddings
from microbert.runtime.metrics import read_metrics

TEXT = "a great film [MASK]"
HUGE = 1_000_000


@pytest.fixture
def make_folder(tmp_path):
    def make(arch="bert"):
        tokenizer = train_tokenizer(
            lambda: iter(["a great film", "a bad film"] * 3), vocab_size=60, lowercase=True, strip_accents=False
        )
        save_model(noisy_model(n_embed=16, vocab_size=tokenizer.get_vocab_size(), arch=arch), tokenizer, tmp_path)
        return tmp_path

    return make


def alter(path, *keys_and_value):
    *keys, last, value = keys_and_value
    whole = part = json.loads(path.read_text())
    for key in keys:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    path.write_text(json.dumps(whole))


def assert_refused(folder, words):
    with pytest.raises(InputError) as refused:
        load_run(folder)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 600 and words in message, message


def test_a_run_with_a_million_positions_uses_only_the_memory_that_its_text_needs(make_folder):
    folder = make_folder("modern")
    expected = fill_mask(*load_run(folder), TEXT)
    alter(folder / "config.json", "max_position_embeddings", HUGE)
    model, tokenizer = load_run(folder)
    assert sum(buffer.numel() for buffer in model.buffers()) <= 2 * TABLE_NUMBERS
    assert model.config.max_seq_len == HUGE and fill_mask(model, tokenizer, TEXT) == expected


SIZES = {
    "positions": ("bert", {"max_position_embeddings": HUGE}),
    "layers": ("bert", {"num_hidden_layers": HUGE}),
    "some layers": ("modern", {"num_hidden_layers": 40}),
    "vocabulary": ("modern", {"vocab_size": HUGE}),
    "width": ("modern", {"hidden_size": HUGE, "num_attention_heads": 2, "intermediate_size": 2666672}),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_larger_than_the_file_are_refused_before_memory_is_allocated(name, make_folder):
    arch, changed = SIZES[name]
    folder = make_folder(arch)
    for key, value in changed.items():
        alter(folder / "config.json", key, value)
    alter(folder / "config.json", "layer_types", None) if arch == "modern" else None
    assert_refused(folder, "larger model")


CONFIGS = {
    "another activation": (["hidden_act", "relu"], "hidden_act is 'relu'"),
    "another epsilon": (["layer_norm_eps", 1e-3], "layer_norm_eps"),
    "no vocabulary": (["vocab_size", None], "'vocab_size' is missing"),
    "no heads": (["num_attention_heads", 0], "num_attention_heads is 0"),
    "a long text": (["hidden_size", "9" * 100_000], "hidden_size is '999"),
    "a list": (["model_type", ["bert"]], "unhashable"),
    "another model": (["model_type", "gpt2"], "gpt2"),
    "three heads": (["num_attention_heads", 3], "does not divide"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_invalid_configuration_is_refused(name, make_folder):
    change, words = CONFIGS[name]
    folder = make_folder()
    alter(folder / "config.json", *change)
    assert_refused(folder, words)


TOKENIZERS = {
    "an id beyond the vocabulary": (["model", "vocab", "film", 5_000_000], "the ids of its"),
    "two tokens of one id": (["model", "vocab", "film", 5], "the ids of its"),
    "no unknown token in the vocabulary": (["model", "vocab", "[UNK]", None], "[UNK]"),
    "another unknown token": (["model", "unk_token", "<unk>"], "[UNK]"),
    "no unknown token": (["model", "unk_token", None], "tokenizer"),
    "special ids elsewhere": (["model", "vocab", "[MASK]", 7], "[MASK] must have the id 4"),
    "no normalizer": (["normalizer", None], "tokenizer"),
    "another normalizer": (["normalizer", {"type": "NFC"}], "normalizer"),
    "words of any length": (["model", "max_input_chars_per_word", 10**6], "which is too slow"),
    "no pre-tokenizer": (["pre_tokenizer", None], "tokenizer"),
    "a pre-tokenizer that takes forever": (
        ["pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}],
        "pre-tokenizer",
    ),
    "a special token beyond the vocabulary": (
        ["post_processor", "special_tokens", "[CLS]", "ids", [5_000_000]],
        "[CLS]",
    ),
    "a special token that nothing defines": (["post_processor", "special_tokens", {}], "[CLS]"),
    "no special tokens around a text": (["post_processor", None], "[CLS] text [SEP]"),
    "an added token": (
        [
            "added_tokens",
            [
                {
                    "id": 0,
                    "content": "film",
                    "special": True,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                }
            ],
        ],
        "tokenizer",
    ),
    "another vocabulary": (["model", "vocab", "zzz", 60], "tokens, but its model"),
    "another model": (
        [
            "model",
            {
                "type": "WordLevel",
                "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4},
                "unk_token": "[UNK]",
            },
        ],
        "WordPiece",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_of_another_kind_is_refused(name, make_folder):
    change, words = TOKENIZERS[name]
    folder = make_folder()
    if name == "another vocabulary":
        change = [*change[:-1], load_run(folder)[1].get_vocab_size()]
    path = folder / "tokenizer.json"
    if change[-1] is None and len(change) == 2:  # null, as the library writes it
        path.write_text(json.dumps(json.loads(path.read_text()) | {change[0]: None}))
    else:
        alter(path, *change)
    assert_refused(folder, words)


def test_a_tokenizer_of_an_older_version_that_did_not_cut_words_is_loaded(make_folder):
    folder = make_folder()
    alter(folder / "tokenizer.json", "pre_tokenizer", {"type": "BertPreTokenizer"})
    _, tokenizer = load_run(folder)
    texts = ["a great film", "a" * 150]
    ids, _ = Encoder(tokenizer).encode(texts)
    assert ids.tolist() == [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize("name", ["AutoTokenizer", "BertTokenizer"])
def test_a_tokenizer_saved_by_transformers_works_as_before(name, make_folder):
    import transformers

    folder = make_folder()
    before = fill_mask(*load_run(folder), TEXT)
    loaded = getattr(transformers, name).from_pretrained(folder)
    loaded(["a great film", "a film"], padding="max_length", truncation=True, max_length=4)
    loaded.save_pretrained(folder)
    assert fill_mask(*load_run(folder), TEXT) == before


WEIGHTS = {
    "not finite": (lambda weight: weight.fill_(math.nan), "not finite"),
    "infinite in fp32": (lambda weight: weight.double() + 1e300, "not finite"),
    "whole numbers": (lambda weight: weight.long(), "int64"),
    "complex": (lambda weight: weight.to(torch.complex64), "complex64"),
    "another shape": (lambda weight: weight[:, :8].contiguous(), "shape"),
    "no rows": (lambda weight: weight[:0].contiguous(), "shape"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_invalid_weights_are_refused(name, make_folder):
    change, words = WEIGHTS[name]
    folder = make_folder()
    weights = load_file(folder / "model.safetensors")
    place = "bert.embeddings.token_type_embeddings.weight"
    weights[place] = change(weights[place])
    save_file(weights, folder / "model.safetensors")
    assert_refused(folder, words)


def test_a_text_that_is_not_utf_8_is_refused(make_folder):
    run, text = load_run(make_folder()), b"\xff [MASK]".decode("utf-8", "surrogateescape")
    with pytest.raises(InputError, match="is not UTF-8"):
        fill_mask(*run, text)


@pytest.mark.parametrize(
    "content", ["no json", "[]", '{"model_max_length": "x", "tokenizer_class": 5, "pad_token": {}}']
)
def test_plots_need_no_tokenizer_config(content, make_folder):
    folder = make_folder("modern")
    (folder / "tokenizer_config.json").write_text(content)
    assert draw_attention(folder, "a great film").axes and draw_embeddings(folder).axes


FINE = {"step": 1, "tokens": 10, "seconds": 1.5, "eval/loss": 3.0}
DAMAGED = [
    '{"step": 1, "eval/loss": NaN}',
    '{"step": true}',
    '{"step": -1}',
    '{"eval/loss": 3.0}',
    "[]",
    '{"step": 1, "seconds": "x"}',
    '{"step": 1, "seconds": 1e999}',
    f'{{"step": 1, "tokens": 1{"0" * 400}}}',
    '{"step": 1, "more": null}',
    "\x00",
    "[" * 100_000,
]


def write_metrics(folder, lines, end="\n"):
    (folder / "metrics.jsonl").write_text("\n".join(lines) + end)
    return folder


@pytest.mark.parametrize("line", DAMAGED, ids=[line[:40] for line in DAMAGED])
def test_a_damaged_line_of_metrics_is_skipped_and_counted(line, tmp_path, capsys):
    folder = write_metrics(tmp_path, [json.dumps(FINE), line, json.dumps(FINE)])
    assert read_metrics(folder / "metrics.jsonl") == [FINE, FINE]
    assert "metrics.jsonl: 1 of 3 lines damaged and skipped" in capsys.readouterr().err
    assert draw_curves([folder]).axes


def test_an_incomplete_last_line_is_skipped_silently(tmp_path, capsys):
    folder = write_metrics(tmp_path, [json.dumps(FINE), '{"step": 2, "ev'], end="")
    assert read_metrics(folder / "metrics.jsonl") == [FINE] and not capsys.readouterr().err


def test_evaluations_that_lack_a_value_are_skipped_and_counted(tmp_path, capsys):
    lacking = [{name: value for name, value in FINE.items() if name != left_out} for left_out in ("tokens", "seconds")]
    folder = write_metrics(tmp_path, map(json.dumps, [FINE, *lacking]))
    [axes, *_] = draw_curves([folder]).axes
    assert len(axes.lines[0].get_xdata()) == 1
    assert "skipped 2 of 3 evaluations" in capsys.readouterr().err
    with pytest.raises(InputError, match="no metrics.jsonl with evaluations"):
        draw_curves([write_metrics(folder, map(json.dumps, lacking))])
