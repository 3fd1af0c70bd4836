"""The tokenizer depends on the text alone, and transformers loads it with the same ids."""

import subprocess
import sys

import pytest
from helpers import ROOT
from prepared import prepare, write_texts_in

from microbert.data.tokenizer import (
    CLS_ID,
    MASK_ID,
    N_SPECIAL,
    PAD_ID,
    SEP_ID,
    SPECIAL_TOKENS,
    UNK_ID,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from microbert.errors import InputError


def test_the_tokenizer_depends_on_the_text_alone():
    program = """
import hashlib
from microbert.data.sources import open_corpus
from microbert.data.tokenizer import train_tokenizer
from configs import configure
texts = [row for rows, _ in open_corpus(configure(max_samples=500), lambda: None).read() for row in rows]
tokenizer = train_tokenizer(lambda: iter(texts), vocab_size=2000, lowercase=True, strip_accents=False)
print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
"""
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            timeout=100,
        ).stdout.splitlines()[-1]
        for _ in range(2)
    }
    assert len(answers) == 1


def test_special_tokens_come_first_and_the_vocabulary_is_limited():
    tokenizer = train_tokenizer(
        lambda: iter(["a few words, and more words"] * 3), vocab_size=30, lowercase=True, strip_accents=False
    )
    assert [tokenizer.id_to_token(i) for i in range(N_SPECIAL)] == list(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() <= 30
    ids = tokenizer.encode("words [MASK] more").ids
    assert ids[0] == CLS_ID and ids[-1] == SEP_ID and MASK_ID in ids


@pytest.mark.parametrize("vocab_size", [6, 7, 20])
def test_a_very_small_vocabulary_is_limited_too(vocab_size):
    tokenizer = train_tokenizer(
        lambda: iter(["abcdefghij klmnop " * 5]), vocab_size=vocab_size, lowercase=True, strip_accents=False
    )
    assert tokenizer.get_vocab_size() <= vocab_size


def test_case_and_accents_are_independent_settings():
    def words(**constants):
        tokenizer = train_tokenizer(lambda: iter(["Énorme énorme enorme Enorme"] * 5), vocab_size=60, **constants)
        return len({tuple(tokenizer.encode(word).ids) for word in ("Énorme", "énorme", "Enorme", "enorme")})

    assert words(lowercase=False, strip_accents=False) == 4
    assert words(lowercase=True, strip_accents=False) == 2
    assert words(lowercase=True, strip_accents=True) == 1


def test_transformers_loads_the_tokenizer_with_the_same_ids(tmp_path):
    import transformers

    tokenizer = train_tokenizer(
        lambda: iter(["some Wörter here, and there"] * 3), vocab_size=80, lowercase=True, strip_accents=False
    )
    save_tokenizer(tokenizer, tmp_path, 16)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Some wörter, [MASK] there", "here" * 40 + ", " + "wör" * 33 + "[MASK]" + "there" * 21):
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
        assert UNK_ID not in loaded(text)["input_ids"]
    assert (loaded.mask_token_id, loaded.pad_token_id, loaded.model_max_length) == (MASK_ID, PAD_ID, 16)


def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_accents_are_stripped_on_request(tmp_path):
    write_texts_in("german", tmp_path)
    vocabulary = prepare(tmp_path, vocab_size=2000, strip_accents=True)[2].get_vocab()
    assert not any("ü" in token for token in vocabulary) and any("uber" in token for token in vocabulary)
