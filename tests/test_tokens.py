"""Tokenizer and token shards: right, the same every time, and going on after a stop."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, listing, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from test_config import configure

from microbert import prepare as prepare_module
from microbert.config import InputError
from microbert.corpus import hold_cache, open_corpus
from microbert.documents import clean, split_hash
from microbert.prepare import packed_sequences, prepare_tokens, truncated_sequences
from microbert.run import Stopped
from microbert.tokenizer import CLS_ID, MASK_ID, N_SPECIAL, PAD_ID, SEP_ID, SPECIAL_TOKENS, get_tokenizer, load_tokenizer, save_tokenizer
from microbert.tokenizer import train_tokenizer


def never_stop():
    pass


def prepare(folder, cache="cache", check_stop=never_stop, **constants):
    if not (folder / "corpus.jsonl").exists():
        write_corpus(folder / "corpus.jsonl")
    constants = {"max_seq_len": 16, "vocab_size": 200, **constants}
    config = configure("--dataset", str(folder / "corpus.jsonl"), "--cache-dir", str(folder / cache), **constants)
    corpus = open_corpus(config, never_stop)
    with hold_cache(corpus, config, never_stop):
        tokenizer = get_tokenizer(corpus, config, never_stop)
        return config, corpus, tokenizer, prepare_tokens(corpus, tokenizer, config, check_stop)


def all_rows(sequences):
    return sequences.read(np.arange(len(sequences)))


def test_the_tokenizer_is_a_function_of_the_text_alone():
    program = """
import hashlib
from microbert.corpus import open_corpus
from microbert.tokenizer import train_tokenizer
from test_config import configure
texts = [row for rows, _ in open_corpus(configure(max_samples=500), lambda: None).read() for row in rows]
tokenizer = train_tokenizer(lambda: iter(texts), vocab_size=2000, lowercase=True, strip_accents=False)
print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
"""
    answers = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT,
                              env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, timeout=100).stdout.splitlines()[-1] for _ in range(2)}
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


encoded_documents = st.lists(st.lists(st.integers(N_SPECIAL, 99), min_size=1, max_size=30).map(lambda ids: np.array(ids, np.uint16)), max_size=12)


def laid_out(layout, encoded, max_seq_len):
    return layout(np.concatenate([np.zeros(0, np.uint16), *encoded]), np.array([len(ids) for ids in encoded], np.int64), max_seq_len)


@given(encoded_documents, st.integers(3, 12))
def test_truncated_rows_hold_the_first_tokens_of_each_document(encoded, max_seq_len):
    rows = laid_out(truncated_sequences, encoded, max_seq_len)
    assert rows.shape == (len(encoded), max_seq_len)
    for row, ids in zip(rows, encoded):
        kept = list(ids[: max_seq_len - 2])
        assert list(row) == [CLS_ID, *kept, SEP_ID] + [PAD_ID] * (max_seq_len - 2 - len(kept))


@given(encoded_documents, st.integers(3, 12))
def test_packed_rows_hold_all_text_in_order_and_only_the_last_is_padded(encoded, max_seq_len):
    rows = laid_out(packed_sequences, encoded, max_seq_len)
    assert (rows[:, 0] == CLS_ID).all() and not (rows[:-1] == PAD_ID).any()
    text = [int(i) for row in rows for i in row[1 : np.flatnonzero(row == SEP_ID)[-1]]]
    expected = [int(i) for ids in encoded for i in (*ids, SEP_ID)][:-1]
    assert text == expected


@pytest.mark.parametrize("packing", [False, True])
def test_the_two_splits_hold_their_own_documents_and_nothing_else(packing, tmp_path):
    config, corpus, tokenizer, tokens = prepare(tmp_path, packing=packing)
    encoded = {"train": [], "held_out": []}
    for text in (clean(row) for rows, _ in corpus.read() for row in rows):
        split = "held_out" if split_hash(text, config.seed) < 2**64 // 10 else "train"
        encoded[split].append(np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint16))
    layout = packed_sequences if packing else truncated_sequences
    assert np.array_equal(all_rows(tokens.train), laid_out(layout, encoded["train"], 16))
    assert np.array_equal(all_rows(tokens.held_out), laid_out(layout, encoded["held_out"], 16))
    assert (tokens.report.train, tokens.report.held_out) == (len(encoded["train"]), len(encoded["held_out"]))
    counts = np.bincount(all_rows(tokens.train).reshape(-1), minlength=tokenizer.get_vocab_size())
    assert np.array_equal(tokens.token_counts[N_SPECIAL:], counts[N_SPECIAL:]) and not tokens.token_counts[:N_SPECIAL].any()


def test_about_ten_thousand_documents_are_held_out_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "HELD_OUT_AT_MOST", 20)
    report = prepare(write_corpus(tmp_path / "corpus.jsonl", 2000).parent)[-1].report
    assert 8 <= report.held_out <= 35 and report.train == 2000 - report.held_out


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_tiny_corpus_holds_out_at_least_one_document(n, tmp_path):
    (tmp_path / "corpus.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(n)))
    report = prepare(tmp_path)[-1].report
    assert 1 <= report.held_out < n and report.train + report.held_out == n


def test_what_is_skipped_and_what_is_doubled_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "HASHES_AT_A_TIME", 30)
    monkeypatch.setattr(prepare_module, "BLOCK_ROWS", 200)
    rows = [f"document number {n % 100}" for n in range(150)] + ["", None, " \ufeff ", "\x00"] + ["[UNK] [UNK]"] + ["\u2060" * 3]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    report = prepare(tmp_path)[-1].report
    assert (report.rows, report.empty, report.documents, report.without_tokens, report.duplicates) == (156, 4, 152, 2, 50)
    assert "156 read" in (printed := capsys.readouterr().out) and "4 empty, 2 without one known token" in printed and "50 duplicates" in printed


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_a_token_is_told_in_bits_a_byte_of_all_text(packing, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BLOCK_ROWS", 10)
    texts = [f"größe number {n} " * (1 + n % 40) for n in range(50)]  # also longer than a sequence, and bytes that are no characters
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    _, _, tokenizer, tokens = prepare(tmp_path, packing=packing)
    n_tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    n_bytes = sum(len(clean(text).encode()) for text in texts)
    assert n_bytes > tokens.report.characters
    assert tokens.report.bits_per_byte(np.log(2)) == pytest.approx(n_tokens / n_bytes)


def test_duplicates_fall_on_one_side(tmp_path):
    lines = [json.dumps({"text": f"document number {n % 50}"}) for n in range(200)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    tokens = prepare(tmp_path)[-1]
    train, held_out = ({tuple(row) for row in all_rows(split)} for split in (tokens.train, tokens.held_out))
    assert train and held_out and not train & held_out


def test_a_preparation_stopped_anywhere_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BLOCK_ROWS", 30)
    monkeypatch.setattr("microbert.file_formats.READ_ROWS", 10)
    prepare(tmp_path, cache="whole")
    whole = listing(tmp_path / "whole")
    stops, rng = 0, random.Random(3)

    def stop_now_and_then():
        if rng.random() < 0.12:
            raise Stopped("test")

    while True:
        try:
            prepare(tmp_path, cache="stopped", check_stop=stop_now_and_then)
            break
        except Stopped:
            stops += 1
    assert stops >= 3
    assert listing(tmp_path / "stopped") == whole


def test_what_decides_the_tokens_is_in_their_key(tmp_path):
    keys = [prepare(tmp_path, **constants)[-1].key for constants in ({}, {"packing": True}, {"max_seq_len": 8}, {"vocab_size": 100},
                                                                       {"seed": 1}, {"max_samples": 100}, {"lowercase": False}, {})]
    assert len(set(keys)) == len(keys) - 1 and keys[0] == keys[-1]


@pytest.mark.parametrize("constant", ["BLOCK_ROWS", "BLOCK_CHARACTERS", "HELD_OUT_AT_MOST"])
def test_a_version_that_lays_blocks_out_otherwise_does_not_mix_with_this_one(constant, tmp_path, monkeypatch):
    before = prepare(tmp_path)[-1].key
    monkeypatch.setattr(prepare_module, constant, 100)
    assert prepare(tmp_path)[-1].key != before


def test_a_damaged_cache_is_an_error_that_names_the_folder(tmp_path):
    prepare(tmp_path)
    shard = next((tmp_path / "cache").rglob("train-00000.npy"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match="delete"):
        prepare(tmp_path)
