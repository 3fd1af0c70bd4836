"""Tokenizer and prepared tokens: right, the same every time, and going on after a stop."""

import errno
import io
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from configs import configure
from helpers import ROOT, listing, write_corpus
from hypothesis import given
from hypothesis import strategies as st

from microbert.data import prepare as prepare_module
from microbert.data import tokenizer as tokenizer_module
from microbert.data.corpus import clean, split_hash
from microbert.data.prepare import packed_parts, packed_sequences, packed_text, prepare_tokens, truncated_sequences
from microbert.data.sources import lock_cache, open_corpus
from microbert.data.tokenizer import (
    CLS_ID,
    MASK_ID,
    N_SPECIAL,
    PAD_ID,
    SEP_ID,
    SPECIAL_TOKENS,
    UNK_ID,
    get_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from microbert.errors import InputError, Stopped


def never_stop():
    pass


def prepare(folder, cache="cache", check_stop=never_stop, **constants):
    if not (folder / "corpus.jsonl").exists():
        write_corpus(folder / "corpus.jsonl")
    constants = {"max_seq_len": 16, "vocab_size": 200, **constants}
    config = configure("--dataset", str(folder / "corpus.jsonl"), "--cache-dir", str(folder / cache), **constants)
    corpus = open_corpus(config, never_stop)
    with lock_cache(corpus, config, never_stop):
        tokenizer = get_tokenizer(corpus, config, never_stop)
        return config, corpus, tokenizer, prepare_tokens(corpus, tokenizer, config, check_stop)


def all_rows(sequences):
    return sequences.read(np.arange(len(sequences)))


def test_the_tokenizer_is_a_function_of_the_text_alone():
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


def test_special_ids_come_first_and_the_size_is_kept():
    tokenizer = train_tokenizer(
        lambda: iter(["a few words, and more words"] * 3), vocab_size=30, lowercase=True, strip_accents=False
    )
    assert [tokenizer.id_to_token(i) for i in range(N_SPECIAL)] == list(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() <= 30
    ids = tokenizer.encode("words [MASK] more").ids
    assert ids[0] == CLS_ID and ids[-1] == SEP_ID and MASK_ID in ids


@pytest.mark.parametrize("vocab_size", [6, 7, 20])
def test_a_very_small_vocabulary_is_still_kept(vocab_size):
    tokenizer = train_tokenizer(
        lambda: iter(["abcdefghij klmnop " * 5]), vocab_size=vocab_size, lowercase=True, strip_accents=False
    )
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


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "tokenizer.json")


encoded_documents = st.lists(
    st.lists(st.integers(N_SPECIAL, 99), min_size=1, max_size=30).map(lambda ids: np.array(ids, np.uint16)), max_size=12
)


def joined(encoded):
    return np.concatenate([np.zeros(0, np.uint16), *encoded]), np.array([len(ids) for ids in encoded], np.int64)


def truncated(encoded, max_seq_len):
    return truncated_sequences(*joined(encoded), max_seq_len)


def packed(encoded, max_seq_len):
    return packed_sequences(packed_text(*joined(encoded), is_first=True), max_seq_len)


@given(encoded_documents, st.integers(3, 12))
def test_truncated_rows_hold_the_first_tokens_of_each_document(encoded, max_seq_len):
    rows = truncated(encoded, max_seq_len)
    assert rows.shape == (len(encoded), max_seq_len)
    for row, ids in zip(rows, encoded):
        kept = list(ids[: max_seq_len - 2])
        assert list(row) == [CLS_ID, *kept, SEP_ID] + [PAD_ID] * (max_seq_len - 2 - len(kept))


@given(encoded_documents, st.integers(3, 12))
def test_packed_rows_hold_all_text_in_order_and_only_the_last_is_padded(encoded, max_seq_len):
    rows = packed(encoded, max_seq_len)
    assert (rows[:, 0] == CLS_ID).all() and not (rows[:-1] == PAD_ID).any()
    text = [int(i) for row in rows for i in row[1 : np.flatnonzero(row == SEP_ID)[-1]]]
    expected = [int(i) for ids in encoded for i in (*ids, SEP_ID)][:-1]
    assert text == expected


@given(st.lists(encoded_documents, max_size=8), st.integers(3, 12))
def test_rows_that_continue_from_block_to_block_are_those_of_all_documents_at_once(blocks, max_seq_len):
    texts = [packed_text(*joined(block), is_first=not any(blocks[:number])) for number, block in enumerate(blocks)]
    parts = packed_parts([len(block) for block in blocks], [sum(map(len, block)) for block in blocks], max_seq_len)
    rows = []
    for number, part in enumerate(parts):
        assert part.blocks[:1] in ([], [number]) and part.is_first == (bool(part.blocks) and not any(blocks[:number]))
        text = np.concatenate([np.zeros(0, np.uint16), *(texts[other] for other in part.blocks)])
        assert part.skip + part.tokens <= len(text)
        rows.append(packed_sequences(text[part.skip : part.skip + part.tokens], max_seq_len))
    whole = packed([document for block in blocks for document in block], max_seq_len)
    assert np.array_equal(np.concatenate([whole[:0], *rows]), whole)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_the_two_splits_hold_their_own_documents_and_nothing_else(packing, block_rows, tmp_path, monkeypatch):
    small_blocks(monkeypatch, block_rows)
    write_corpus(tmp_path / "corpus.jsonl", 80)
    config, corpus, tokenizer, tokens = prepare(tmp_path, packing=packing)
    encoded = {"train": [], "held_out": []}
    for text in (clean(row) for rows, _ in corpus.read() for row in rows):
        split = "held_out" if split_hash(text, config.seed) < 2**64 // 10 else "train"
        encoded[split].append(np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint16))
    for split in ("train", "held_out"):
        rows = packed(encoded[split], 16) if packing else truncated(encoded[split], 16)
        assert np.array_equal(all_rows(getattr(tokens, split)), rows[(rows >= N_SPECIAL).any(axis=1)])
    assert (tokens.report.train, tokens.report.held_out) == (len(encoded["train"]), len(encoded["held_out"]))
    counts = np.bincount(all_rows(tokens.train).reshape(-1), minlength=tokenizer.get_vocab_size())
    assert (
        np.array_equal(tokens.token_counts[N_SPECIAL:], counts[N_SPECIAL:])
        and not tokens.token_counts[:N_SPECIAL].any()
    )


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
    rows = (
        [f"document number {n % 100}" for n in range(150)]
        + ["", None, " \ufeff ", "\x00"]
        + ["[UNK] [UNK]"]
        + ["\u2060" * 3]
    )
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    report = prepare(tmp_path)[-1].report
    assert (report.rows, report.empty, report.documents, report.unknown, report.duplicates) == (156, 4, 152, 2, 50)
    assert (
        "156 read" in (printed := capsys.readouterr().out)
        and "4 empty, 2 without one known token" in printed
        and "50 duplicates" in printed
    )


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_a_token_is_told_in_bits_a_byte_of_all_text(packing, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BLOCK_ROWS", 10)
    texts = [
        f"größe number {n} " * (1 + n % 40) for n in range(50)
    ]  # also longer than a sequence, and bytes that are no characters
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
    monkeypatch.setattr("microbert.data.file_formats.READ_ROWS", 10)

    def written(cache):  # file_hashes.json only when the corpus has not changed for some seconds
        return {name: digest for name, digest in listing(tmp_path / cache).items() if name != "file_hashes.json"}

    prepare(tmp_path, cache="whole", packing=True)
    stops, rng = 0, random.Random(3)

    def stop_now_and_then():
        if rng.random() < 0.12:
            raise Stopped("test")

    while True:
        try:
            prepare(tmp_path, cache="stopped", check_stop=stop_now_and_then, packing=True)
            break
        except Stopped:
            stops += 1
    assert stops >= 3
    assert written("stopped") == written("whole")


def test_what_decides_the_tokens_is_in_their_key(tmp_path):
    keys = [
        prepare(tmp_path, **constants)[-1].key
        for constants in (
            {},
            {"packing": True},
            {"max_seq_len": 8},
            {"vocab_size": 100},
            {"seed": 1},
            {"max_samples": 100},
            {"lowercase": False},
            {},
        )
    ]
    assert len(set(keys)) == len(keys) - 1 and keys[0] == keys[-1]


@pytest.mark.parametrize("constant", ["BLOCK_ROWS", "BLOCK_CHARACTERS", "HELD_OUT_AT_MOST"])
def test_a_version_that_lays_blocks_out_otherwise_does_not_mix_with_this_one(constant, tmp_path, monkeypatch):
    before = prepare(tmp_path)[-1].key
    monkeypatch.setattr(prepare_module, constant, 100)
    assert prepare(tmp_path)[-1].key != before


def test_a_damaged_cache_is_an_error_that_names_the_folder(tmp_path):
    prepare(tmp_path)
    [path] = (tmp_path / "cache").rglob("train.bin")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="delete"):
        prepare(tmp_path)


def write_texts(folder, texts):
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")


def small_blocks(monkeypatch, rows):
    monkeypatch.setattr(prepare_module, "BLOCK_ROWS", rows)
    monkeypatch.setattr("microbert.data.file_formats.READ_ROWS", rows)


def warnings(printed):
    return [line for line in printed.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("lengths", [(500,), (40, 160), (101,)])
def test_text_without_spaces_is_encoded_whatever_its_length(lengths, tmp_path):
    rng = random.Random(1)
    write_texts(tmp_path, ["".join(rng.choices("ACGT", k=rng.choice(lengths))) for _ in range(100)])
    _, _, _, tokens = prepare(tmp_path, vocab_size=300)
    report = tokens.report
    assert (report.train + report.held_out, report.unknown, report.unknown_tokens) == (100, 0, 0)
    assert report.tokens > 100 * min(lengths) / 10


def test_unknown_tokens_are_counted_before_documents_are_left_out_or_cut(tmp_path, monkeypatch, capsys):
    small_blocks(monkeypatch, 20)
    monkeypatch.setattr(tokenizer_module, "SAMPLE_CHARACTERS", 200)
    known = ["plain words " * n for n in range(1, 61)]
    odd = ["\u0416\u0416"] * 30 + ["plain words " * 20 + "\u2603" * 150] * 10
    write_texts(tmp_path, known + odd)
    _, _, tokenizer, tokens = prepare(tmp_path)
    ids = [i for text in known + odd for i in tokenizer.encode(text, add_special_tokens=False).ids]
    words = [i for i in ids if not tokenizer.id_to_token(i).startswith("##")]
    report = tokens.report
    assert (report.tokens, report.unknown_tokens, report.words) == (len(ids), ids.count(UNK_ID), len(words))
    assert (report.unknown, report.unknown_tokens) == (30, 30 + 10 * 2)  # a word of 150 characters is two
    assert tokens.unknown_characters == {"\u2603": 1500, "\u0436": 60}
    [warning] = warnings(capsys.readouterr().out)
    assert f"50 of {len(ids):,} tokens are unknown, and 30 of 100 documents are left out" in warning
    assert "(U+2603, 1,500 times), \u0436 (U+0436, 60 times)" in warning and "its sample" in warning
    assert "vocab_size" not in warning


def test_the_warning_of_unknown_tokens_names_their_cause(tmp_path, capsys):
    rng = random.Random(2)
    write_texts(tmp_path, ["".join(chr(0x4E00 + int(rng.expovariate(0.01))) for _ in range(50)) for _ in range(200)])
    prepare(tmp_path, vocab_size=105)
    [warning] = warnings(capsys.readouterr().out)
    assert "The tokenizer knows 50 characters, as many as vocab_size = 105 has room for" in warning
    assert "sample" not in warning
    write_texts(tmp_path, [f"a few words {n} [UNK]" for n in range(100)])
    prepare(tmp_path)
    [warning] = warnings(capsys.readouterr().out)
    assert warning.endswith("documents are left out for it; 100 are [UNK] in the text itself")


@pytest.mark.parametrize("packing", [False, True])
def test_documents_that_begin_with_unknown_tokens_are_left_out_only_where_they_are_cut(packing, tmp_path, capsys):
    write_texts(tmp_path, ["[UNK] " * 20 + f"word {n}" for n in range(30)] + [f"word {n}" for n in range(30)])
    _, _, _, tokens = prepare(tmp_path, packing=packing)
    report, left_out = tokens.report, 0 if packing else 30
    assert (report.unknown, report.unknown_start, report.train + report.held_out) == (0, left_out, 60 - left_out)
    printed = capsys.readouterr().out
    assert ("30 without one in their first 14 tokens" in printed) == (not packing)
    assert (report.unknown_sequences > 0) == packing == ("left out without one known token" in printed)
    for split in (tokens.train, tokens.held_out):
        assert len(split) and (all_rows(split) >= N_SPECIAL).any(axis=1).all()


def test_sequences_of_separators_alone_are_left_out(tmp_path):
    _, _, _, tokens = prepare(tmp_path, packing=True, max_seq_len=3)
    assert tokens.report.unknown_sequences == tokens.report.documents - 2  # one [SEP] between two documents of a split
    assert (all_rows(tokens.train)[:, 1] >= N_SPECIAL).all()


def test_text_of_which_nothing_can_be_held_out_is_refused_with_the_reason(tmp_path):
    write_texts(tmp_path, ["[UNK] " * 20 + f"word {n}" for n in range(30)] + ["word"])
    reason = "two different documents.*31 read, 1 used; skipped: 30 without one in their first 14 tokens"
    with pytest.raises(InputError, match=reason):
        prepare(tmp_path)


def test_only_the_last_row_of_a_split_is_padded_however_many_blocks_there_are(tmp_path, monkeypatch):
    small_blocks(monkeypatch, 2)
    write_corpus(tmp_path / "corpus.jsonl", 80)
    _, _, _, tokens = prepare(tmp_path, packing=True)
    for split in (tokens.train, tokens.held_out):
        assert len(split) > 5 and not (all_rows(split)[:-1] == PAD_ID).any()


def stop_in_the_middle(folder, monkeypatch):
    """Leaves at least three blocks of 30 rows."""

    def check_stop():
        if len(list(folder.rglob("block-*.json"))) >= 3:
            raise Stopped("test")

    small_blocks(monkeypatch, 30)
    with pytest.raises(Stopped):
        prepare(folder, check_stop=check_stop)


WRONG = {
    "a text for a number": {"rows": "100"},
    "a number with a point": {"tokens": 1.5},
    "truth": {"unknown": True},
    "below 0": {"empty": -1},
    "a list": {"end": [0, 30, 30]},
    "no position": {"end": None},
    "no dictionary": {"unknown_characters": []},
    "one more": {"more": 1},
    "another position": {"end": {"part": 0, "row": 0, "rows": 0}},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_record_of_a_block_is_reported_in_a_line_and_prepared_again(name, tmp_path, monkeypatch, capsys):
    stop_in_the_middle(tmp_path, monkeypatch)
    [record] = tmp_path.rglob("block-00001.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | WRONG[name]))
    capsys.readouterr()
    report = prepare(tmp_path)[-1].report
    assert (report.rows, report.train + report.held_out) == (300, 300)
    printed = capsys.readouterr().out
    [warning] = warnings(printed)
    assert f"{record} is damaged" in warning and "going on behind 30 rows" in printed


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: arrays | {"lengths": arrays["lengths"] + 1},
        lambda arrays: arrays | {"hashes": arrays["hashes"][1:]},
        lambda arrays: arrays | {"ids": arrays["ids"].astype(float)},
        lambda arrays: {"ids": arrays["ids"]},
    ],
)
def test_a_damaged_block_is_reported_in_a_line(damage, tmp_path, monkeypatch):
    stop_in_the_middle(tmp_path, monkeypatch)
    [path] = tmp_path.rglob("block-00001.npz")
    with np.load(path) as block:
        arrays = dict(block)
    np.savez(path, **damage(arrays))
    with pytest.raises(InputError, match="block-00001.npz is damaged.*delete"):
        prepare(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux lists them")
def test_open_files_do_not_grow_with_the_number_of_blocks(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus.jsonl", 80)
    counts = []
    for rows in (80, 2):
        small_blocks(monkeypatch, rows)
        before = len(os.listdir("/proc/self/fd"))
        tokens = prepare(tmp_path, packing=True)[-1]
        all_rows(tokens.train)
        counts.append(len(os.listdir("/proc/self/fd")) - before)
        del tokens
    assert counts[0] == counts[1] <= 2


@pytest.mark.fault(row=34)
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("function", ["microbert.data.shards.read_json", "numpy.memmap", "numpy.load"])
def test_tokens_that_the_system_cannot_open_are_not_called_damaged(number, function, tmp_path, monkeypatch):
    prepare(tmp_path)
    before = listing(tmp_path / "cache")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(function, refuse)
    with pytest.raises(OSError) as caught:
        prepare(tmp_path)
    assert caught.value.errno == number and listing(tmp_path / "cache") == before


@pytest.mark.fault(row=34)
@pytest.mark.parametrize("name", ["block-00001.json", "block-00001.npz"])
def test_a_block_that_the_system_cannot_open_stays(name, tmp_path, monkeypatch):
    stop_in_the_middle(tmp_path, monkeypatch)
    [path] = tmp_path.rglob(name)
    before, real = path.read_bytes(), io.open

    def refuse(file, *arguments, **options):
        if str(file) == str(path):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(file))
        return real(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        patch.setattr(io, "open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            prepare(tmp_path)
    assert path.read_bytes() == before
