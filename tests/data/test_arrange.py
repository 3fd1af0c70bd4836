"""Documents arranged in sequences: truncated, or packed across blocks."""

import numpy as np
import pytest
from helpers import write_corpus
from hypothesis import given
from hypothesis import strategies as st
from prepared import all_rows, prepare, small_blocks, write_texts

from microbert.data.arrange import first_tokens, packed_parts, packed_sequences, packed_text, truncated_sequences
from microbert.data.corpus import clean, split_hash
from microbert.data.shards import LONGEST_ROW
from microbert.data.tokenizer import CLS_ID, N_SPECIAL, PAD_ID, SEP_ID

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
def test_truncated_sequences_contain_the_first_tokens_of_each_document(encoded, max_seq_len):
    rows = truncated(encoded, max_seq_len)
    assert rows.shape == (len(encoded), max_seq_len)
    for row, ids in zip(rows, encoded, strict=True):
        kept = list(ids[: max_seq_len - 2])
        assert list(row) == [CLS_ID, *kept, SEP_ID] + [PAD_ID] * (max_seq_len - 2 - len(kept))


@given(encoded_documents, st.integers(3, 12))
def test_packed_sequences_contain_all_text_in_order_and_only_the_last_is_padded(encoded, max_seq_len):
    rows = packed(encoded, max_seq_len)
    assert (rows[:, 0] == CLS_ID).all() and not (rows[:-1] == PAD_ID).any()
    text = [int(i) for row in rows for i in row[1 : np.flatnonzero(row == SEP_ID)[-1]]]
    expected = [int(i) for ids in encoded for i in (*ids, SEP_ID)][:-1]
    assert text == expected


@given(st.lists(encoded_documents, max_size=8), st.integers(3, 12))
def test_sequences_across_blocks_equal_those_of_all_documents_at_once(blocks, max_seq_len):
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
def test_each_split_contains_its_own_documents_only(packing, block_rows, tmp_path, monkeypatch):
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
    assert np.array_equal(tokens.held_out_documents, first_tokens(*joined(encoded["held_out"]), LONGEST_ROW - 2))
    counts = tokens.corpus_counts
    assert (counts.train, counts.held_out) == (len(encoded["train"]), len(encoded["held_out"]))
    token_counts = np.bincount(all_rows(tokens.train).reshape(-1), minlength=tokenizer.get_vocab_size())
    assert np.array_equal(tokens.token_counts[N_SPECIAL:], token_counts[N_SPECIAL:])
    assert not tokens.token_counts[:N_SPECIAL].any()


def test_sequences_of_separators_alone_are_skipped(tmp_path):
    _, _, _, tokens = prepare(tmp_path, packing=True, max_seq_len=3)
    # with one token per sequence, each [SEP] between two documents is a sequence without a known token
    assert tokens.corpus_counts.unknown_sequences == tokens.corpus_counts.documents - 2
    assert (all_rows(tokens.train)[:, 1] >= N_SPECIAL).all()


def test_only_the_last_sequence_of_a_split_is_padded_for_any_number_of_blocks(tmp_path, monkeypatch):
    small_blocks(monkeypatch, 2)
    write_corpus(tmp_path / "corpus.jsonl", 80)
    _, _, _, tokens = prepare(tmp_path, packing=True)
    for split in (tokens.train, tokens.held_out):
        assert len(split) > 5 and not (all_rows(split)[:-1] == PAD_ID).any()


@pytest.mark.parametrize("packing, max_seq_len", [(False, 16), (False, 600), (True, 16)])
def test_the_beginnings_of_held_out_documents_have_510_tokens_at_most(packing, max_seq_len, tmp_path, monkeypatch):
    small_blocks(monkeypatch, 3)
    lengths = [5, 509, 510, 511, 800]
    texts = [" ".join([f"film{number % 7}", *["film"] * (lengths[number % 5] - 2)]) for number in range(150)]
    write_texts(tmp_path, texts)
    config, _, tokenizer, tokens = prepare(tmp_path, packing=packing, max_seq_len=max_seq_len)
    held_out = [text for text in texts if split_hash(text, config.seed) < 2**64 // 10]
    assert len(held_out) > 5 and tokens.held_out_documents.shape == (len(held_out), 510)
    for row, text in zip(tokens.held_out_documents.tolist(), held_out, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:510]
        assert row == ids + [PAD_ID] * (510 - len(ids))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("block_rows", [1, 1000])
def test_the_beginning_of_the_only_held_out_document_is_whole(packing, block_rows, tmp_path, monkeypatch):
    """Whatever its hash is: of a few documents, the one with the smallest hash is held out."""
    small_blocks(monkeypatch, block_rows)
    for seed in range(4):
        texts = [" ".join(["film", *["slow"] * number]) for number in (30, 40, 50)]
        write_texts(tmp_path, texts)
        config, _, tokenizer, tokens = prepare(tmp_path, packing=packing, seed=seed)
        [text] = [text for text in texts if split_hash(text, seed) < tokens.held_out_below]
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokens.held_out_documents.tolist() == [ids + [PAD_ID] * (510 - len(ids))]
