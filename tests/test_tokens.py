"""Tokenizer and token shards: right, the same every time, and going on after a stop."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, listing, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from test_config import configure

from microbert import tokens as tokens_module
from microbert.config import InputError
from microbert.corpus import documents, open_corpus, split_hash, survey_corpus
from microbert.run import Stopped
from microbert.tokenizer import CLS_ID, MASK_ID, N_SPECIAL, PAD_ID, SEP_ID, SPECIAL_TOKENS, get_tokenizer, load_tokenizer, save_tokenizer
from microbert.tokenizer import train_tokenizer
from microbert.tokens import packed_sequences, prepare_tokens, truncated_sequences


def never_stop():
    pass


def prepare(folder, cache="cache", check_stop=never_stop, **constants):
    if not (folder / "corpus.jsonl").exists():
        write_corpus(folder / "corpus.jsonl")
    constants = {"max_seq_len": 16, "vocab_size": 200, **constants}
    config = configure("--dataset", str(folder / "corpus.jsonl"), "--cache-dir", str(folder / cache), **constants)
    corpus = open_corpus(config)
    survey = survey_corpus(corpus, config, never_stop)
    tokenizer = get_tokenizer(corpus, survey, config, never_stop)
    return config, corpus, survey, tokenizer, prepare_tokens(corpus, survey, tokenizer, config, check_stop)


def all_rows(sequences):
    return sequences.read(np.arange(len(sequences)))


def test_the_tokenizer_is_a_function_of_the_text_alone():
    program = """
import hashlib
from microbert.corpus import open_corpus, documents
from microbert.tokenizer import train_tokenizer
from test_config import configure
texts = list(documents(open_corpus(configure(max_samples=500)).rows()))
tokenizer = train_tokenizer(lambda: iter(texts), vocab_size=2000, lowercase=True, strip_accents=False)
print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
"""
    answers = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT,
                              env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, timeout=100).stdout.splitlines()[-1] for _ in range(3)}
    assert len(answers) == 1


def test_special_ids_come_first_and_the_size_is_kept():
    tokenizer = train_tokenizer(lambda: iter(["a few words, and more words"] * 3), vocab_size=30, lowercase=True, strip_accents=False)
    assert [tokenizer.id_to_token(i) for i in range(N_SPECIAL)] == list(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() <= 30
    ids = tokenizer.encode("words [MASK] more").ids
    assert ids[0] == CLS_ID and ids[-1] == SEP_ID and MASK_ID in ids


@pytest.mark.parametrize("vocab_size", [6, 7, 20])
def test_a_very_small_vocabulary_is_still_kept(vocab_size):
    tokenizer = train_tokenizer(lambda: iter(["abcdefghij klmnop " * 5]), vocab_size=vocab_size, lowercase=True, strip_accents=False)
    assert tokenizer.get_vocab_size() <= vocab_size


def test_case_and_accents_are_two_constants():
    def words(**constants):
        tokenizer = train_tokenizer(lambda: iter(["Énorme énorme enorme Enorme"] * 5), vocab_size=60, **constants)
        return len({tuple(tokenizer.encode(word).ids) for word in ("Énorme", "énorme", "Enorme", "enorme")})

    assert words(lowercase=False, strip_accents=False) == 4
    assert words(lowercase=True, strip_accents=False) == 2
    assert words(lowercase=True, strip_accents=True) == 1


def test_transformers_loads_the_tokenizer_with_the_same_ids(tmp_path):
    import transformers

    tokenizer = train_tokenizer(lambda: iter(["some Wörter here, and there"] * 3), vocab_size=80, lowercase=True, strip_accents=False)
    save_tokenizer(tokenizer, tmp_path, 16)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Some wörter, [MASK] there"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert (loaded.mask_token_id, loaded.pad_token_id, loaded.model_max_length) == (MASK_ID, PAD_ID, 16)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "tokenizer.json")


encoded_documents = st.lists(st.lists(st.integers(N_SPECIAL, 99), min_size=1, max_size=30).map(lambda ids: np.array(ids)), max_size=12)


@given(encoded_documents, st.integers(3, 12))
def test_truncated_rows_hold_the_first_tokens_of_each_document(encoded, max_seq_len):
    rows = truncated_sequences(encoded, max_seq_len)
    assert rows.shape == (len(encoded), max_seq_len)
    for row, ids in zip(rows, encoded):
        kept = list(ids[: max_seq_len - 2])
        assert list(row) == [CLS_ID, *kept, SEP_ID] + [PAD_ID] * (max_seq_len - 2 - len(kept))


@given(encoded_documents, st.integers(3, 12))
def test_packed_rows_hold_all_text_in_order_and_only_the_last_is_padded(encoded, max_seq_len):
    rows = packed_sequences(encoded, max_seq_len)
    assert (rows[:, 0] == CLS_ID).all() and not (rows[:-1] == PAD_ID).any()
    text = [int(i) for row in rows for i in row[1 : np.flatnonzero(row == SEP_ID)[-1]]]
    expected = [int(i) for ids in encoded for i in (*ids, SEP_ID)][:-1]
    assert text == expected


@pytest.mark.parametrize("packing", [False, True])
def test_the_two_splits_hold_their_own_documents_and_nothing_else(packing, tmp_path):
    config, corpus, survey, tokenizer, tokens = prepare(tmp_path, packing=packing)
    vocabulary = {}
    for text in documents(corpus.rows()):
        split = "held_out" if split_hash(text, config.seed) < survey.held_out_below else "train"
        vocabulary.setdefault(split, []).append(np.array(tokenizer.encode(text, add_special_tokens=False).ids))
    layout = packed_sequences if packing else truncated_sequences
    assert np.array_equal(all_rows(tokens.train), layout(vocabulary["train"], 16))
    assert np.array_equal(all_rows(tokens.held_out), layout(vocabulary["held_out"], 16))
    counts = np.bincount(all_rows(tokens.train).reshape(-1), minlength=tokenizer.get_vocab_size())
    assert np.array_equal(tokens.token_counts[N_SPECIAL:], counts[N_SPECIAL:]) and not tokens.token_counts[:N_SPECIAL].any()


def test_duplicates_fall_on_one_side(tmp_path):
    lines = [json.dumps({"text": f"document number {n % 50}"}) for n in range(200)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    tokens = prepare(tmp_path)[-1]
    train, held_out = ({tuple(row) for row in all_rows(split)} for split in (tokens.train, tokens.held_out))
    assert train and held_out and not train & held_out


def test_a_preparation_stopped_between_any_two_blocks_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "BLOCK_ROWS", 30)
    prepare(tmp_path, cache="whole")
    whole = listing(tmp_path / "whole")
    stops = 0
    calls = 0

    def stop_every_second_time():
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise Stopped("test")

    while True:
        try:
            prepare(tmp_path, cache="stopped", check_stop=stop_every_second_time)
            break
        except Stopped:
            stops += 1
    assert stops >= 5
    assert listing(tmp_path / "stopped") == whole


def test_what_decides_the_tokens_is_in_their_key(tmp_path):
    keys = [prepare(tmp_path, **constants)[-1].key for constants in ({}, {"packing": True}, {"max_seq_len": 8}, {"vocab_size": 100},
                                                                       {"seed": 1}, {"max_samples": 100}, {"lowercase": False}, {})]
    assert len(set(keys)) == len(keys) - 1 and keys[0] == keys[-1]


def test_a_damaged_cache_is_an_error_that_names_the_folder(tmp_path):
    prepare(tmp_path)
    shard = next((tmp_path / "cache").rglob("train-00000.npy"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match="delete"):
        prepare(tmp_path)


def test_a_pickle_in_the_cache_is_refused_and_not_run(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    prepare(tmp_path)
    shard = next((tmp_path / "cache").rglob("token_counts.npy"))
    shard.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError):
        prepare(tmp_path)
    assert not (tmp_path / "canary").exists()
