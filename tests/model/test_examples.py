"""Examples at the end of a run are spans of its held-out text, of any kind."""

import random
import types

import numpy as np
import pytest
import torch
from helpers import WORDS

from microbert.data.arrange import packed_sequences, packed_text, truncated_sequences
from microbert.data.shards import Sequences
from microbert.data.tokenizer import N_SPECIAL, UNK_ID, train_tokenizer
from microbert.fill_mask import fill_mask
from microbert.model.build import build_model
from microbert.model.examples import N_EXAMPLES, find_examples
from microbert.model.layers import ModelConfig

THAI = [chr(0xE01 + number) for number in range(40)]


def documents(kind, n=60):
    """Return texts of a kind, the same at each call."""
    rng = random.Random(0)
    if kind == "english":
        sentences = [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) + " ." for _ in range(6 * n)]
        return [" ".join(sentences[start : start + 6]) for start in range(0, 6 * n, 6)]
    if kind == "dna":
        return ["".join(rng.choices("ACGT", k=90)) for _ in range(n)]
    if kind == "thai":
        return [" ".join("".join(rng.choices(THAI, k=rng.randint(5, 40))) for _ in range(4)) for _ in range(n)]
    if kind == "short":
        return [" ".join(rng.choices(WORDS, k=3)) for _ in range(n)]
    return [" ".join(rng.choices("|`*#<", k=20)) for _ in range(n)]  # punctuation


def prepared(texts, vocab_size=300, max_seq_len=32, packing=False):
    """Return an untrained model, a tokenizer, tokens with all texts held out, and their sequences."""
    tokenizer = train_tokenizer(lambda: iter(texts), vocab_size=vocab_size, lowercase=True, strip_accents=False)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    lengths = np.array([len(one) for one in ids])
    if packing:
        sequences = packed_sequences(packed_text(np.concatenate(ids), lengths, is_first=True), max_seq_len)
    else:
        ids, lengths = [one[: max_seq_len - 2] for one in ids], np.minimum(lengths, max_seq_len - 2)
        sequences = truncated_sequences(np.concatenate(ids), lengths, max_seq_len)
    counts = np.bincount(sequences.reshape(-1), minlength=tokenizer.get_vocab_size())
    counts[:N_SPECIAL] = 0
    shape = ModelConfig(len(counts), n_layers=1, n_heads=2, n_embed=4, max_seq_len=max_seq_len, dropout=0.0)
    model = build_model(shape, 0)
    return model, tokenizer, types.SimpleNamespace(held_out=Sequences(sequences), token_counts=counts), sequences


def filled(example):
    """Return the text before masking."""
    return example.text.replace("[MASK]", example.word.removeprefix("##"), 1)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["english", "dna", "thai", "short", "punctuation"])
def test_examples_are_spans_of_the_held_out_text(kind, packing):
    texts = documents(kind)
    model, tokenizer, tokens, _ = prepared(texts, packing=packing)
    examples = find_examples(model, tokenizer, tokens.held_out, tokens.token_counts, seed=42)
    assert len(examples) == N_EXAMPLES == len({example.text for example in examples})
    for example in examples:
        assert example.text.count("[MASK]") == 1
        assert filled(example).replace(" ", "") in "".join(texts).lower().replace(" ", "")
        assert 2 <= len(tokenizer.encode(filled(example), add_special_tokens=False).ids) <= 30
        assert tokenizer.token_to_id(example.word) >= N_SPECIAL
        assert 0 < example.probability < 1 and len(example.guesses) == 5
        assert not any("\n" in line for line in example.lines())


def test_the_masked_token_is_a_whole_meaningful_word_of_whole_sentences():
    texts = documents("english")
    model, tokenizer, tokens, _ = prepared(texts, max_seq_len=64)
    common = tokenizer.id_to_token(int(tokens.token_counts.argmax()))
    for seed in range(5):
        for example in find_examples(model, tokenizer, tokens.held_out, tokens.token_counts, seed):
            assert example.word in WORDS and example.word not in (".", "a", common)
            assert example.text.endswith(".") and 8 <= len(example.text.split()) <= 20
            [guesses] = fill_mask(model, tokenizer, example.text)
            assert [token for token, _ in guesses] == [token for token, _ in example.guesses]


def test_examples_depend_on_the_seed_only():
    model, tokenizer, tokens, _ = prepared(documents("english"))
    first, again, other = (
        find_examples(model, tokenizer, tokens.held_out, tokens.token_counts, seed) for seed in (42, 42, 2**63 - 1)
    )
    assert first == again and {example.text for example in first} != {example.text for example in other}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("max_seq_len", range(3, 11))
@pytest.mark.parametrize("kind", ["english", "dna"])
def test_spans_that_are_too_long_or_too_short_are_not_shown(kind, max_seq_len, packing):
    model, tokenizer, tokens, _ = prepared(documents(kind), max_seq_len=max_seq_len, packing=packing)
    examples = find_examples(model, tokenizer, tokens.held_out, tokens.token_counts, seed=42)
    least = 4 if kind == "dna" else 5  # tokens: one alone has no context, and the last word may have been cut
    assert len(examples) == (N_EXAMPLES if max_seq_len >= least else 0)
    if kind == "english":
        assert all(len(tokenizer.encode(example.text).ids) <= max_seq_len for example in examples)


@pytest.mark.parametrize("vocab_size", [6, 7, 12])
def test_a_tiny_vocabulary_works(vocab_size):
    model, tokenizer, tokens, sequences = prepared(documents("english"), vocab_size=vocab_size)
    assert (sequences == UNK_ID).mean() > 0.1
    for example in find_examples(model, tokenizer, tokens.held_out, tokens.token_counts, seed=42):
        assert "[UNK]" not in example.text and len(example.guesses) == min(5, vocab_size - N_SPECIAL)


def test_text_of_unknown_tokens_has_no_examples():
    model, tokenizer, tokens, sequences = prepared(documents("english"))
    sequences[sequences >= N_SPECIAL] = UNK_ID
    assert find_examples(model, tokenizer, tokens.held_out, tokens.token_counts, seed=42) == []


def test_a_word_cut_at_the_end_of_a_sequence_is_not_shown():
    """Each letter is a token here, so most sequences end inside a word."""
    texts = documents("english")
    model, tokenizer, tokens, _ = prepared(texts, vocab_size=60, max_seq_len=24, packing=True)
    words = set(" ".join(texts).split())
    for seed in range(10):
        assert all(
            set(filled(example).split()) <= words
            for example in find_examples(model, tokenizer, tokens.held_out, tokens.token_counts, seed)
        )


def test_repeated_text_is_shown_once():
    model, tokenizer, tokens, _ = prepared(["the film was great and never slow ."] * 50)
    assert len(find_examples(model, tokenizer, tokens.held_out, tokens.token_counts, seed=42)) == 1


def test_the_model_does_not_change():
    model, tokenizer, tokens, _ = prepared(documents("english"))
    before = [parameter.clone() for parameter in model.parameters()]
    find_examples(model, tokenizer, tokens.held_out, tokens.token_counts, seed=42)
    assert all(map(torch.equal, before, model.parameters()))
