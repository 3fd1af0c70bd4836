"""Training documents on disk: prepared in any blocks, interrupted, from hostile text, and damaged."""

import functools
import json

import numpy as np
import pytest
from helpers import listing, write_corpus
from prepared import prepare, prepare_as_in_a_run, prepare_with_stops, small_blocks, write_texts

from microbert.config.constants import resolve_batch_size
from microbert.data.corpus import clean, split_hash
from microbert.data.documents import SIZES, Documents
from microbert.data.pieces import LONGEST_PART, PLANS, cut_documents
from microbert.data.row_lengths import draw_weights
from microbert.data.tokenizer import CLS_ID, N_SPECIAL, PAD_ID, SEP_ID
from microbert.data.training_rows import training_rows
from microbert.errors import InputError

DOCUMENTS = {"rows": "documents", "packing": True, "arch": "modern"}


def prepare_documents(folder, **constants):
    return prepare(folder, **{**DOCUMENTS, **constants})


def training_documents(corpus, tokenizer, tokens):
    """Return the ids of each training document."""
    texts = [text for rows, _ in corpus.read() for text in map(clean, rows) if text]
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [
        ids
        for ids, text in zip(encoded, texts, strict=True)
        if split_hash(text, 42) >= tokens.held_out_below and any(i >= N_SPECIAL for i in ids)
    ]


def rows_of_plan(documents, plan):
    """Return all rows of a plan as tuples without padding."""
    rows = []
    for kind, n in enumerate(documents.n_rows[plan]):
        numbers = documents.numbers(kind, np.full(n, plan), np.arange(n))
        rows += [tuple(i for i in row if i != PAD_ID) for row in documents.read(kind, numbers).tolist()]
    return sorted(rows)


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_the_rows_are_the_pieces_of_the_training_documents(block_rows, tmp_path, monkeypatch):
    small_blocks(monkeypatch, block_rows)
    write_corpus(tmp_path / "corpus.jsonl", 80)
    config, corpus, tokenizer, tokens = prepare_documents(tmp_path)
    encoded = training_documents(corpus, tokenizer, tokens)
    text, sizes = [i for ids in encoded for i in ids], np.array([len(ids) for ids in encoded])
    documents = tokens.train
    assert isinstance(documents, Documents) and documents.ids.tolist() == text
    assert len(documents) == documents.n_rows[0].sum() > 80
    for plan in range(PLANS):
        cut = cut_documents(sizes, 0, config.seed, plan, documents.row_lengths, draw_weights(documents.row_lengths))
        expected = sorted(
            (CLS_ID, *text[start : start + size], SEP_ID) for start, size in zip(cut.starts, cut.sizes, strict=True)
        )
        assert rows_of_plan(documents, plan) == expected
    counts = np.bincount(text, minlength=tokenizer.get_vocab_size())
    assert np.array_equal(tokens.token_counts[N_SPECIAL:], counts[N_SPECIAL:])


def test_held_out_sequences_are_those_of_packed_rows(tmp_path):
    packed, documents = prepare(tmp_path, packing=True)[-1], prepare_documents(tmp_path)[-1]
    assert packed.key != documents.key
    assert np.array_equal(packed.held_out.rows, documents.held_out.rows)
    assert np.array_equal(packed.held_out_documents, documents.held_out_documents)


def test_the_key_contains_what_determines_the_pieces(tmp_path, monkeypatch):
    keys = [prepare_documents(tmp_path, **constants)[-1].key for constants in ({}, {"arch": "bert"}, {"seed": 1}, {})]
    monkeypatch.setattr("microbert.data.prepare.MOST_WASTE", 0.5)
    keys.append(prepare_documents(tmp_path)[-1].key)
    assert keys[0] == keys[3] and len(set(keys)) == 4


def test_a_preparation_stopped_anywhere_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    small_blocks(monkeypatch, 30)

    def written(cache):
        return {name: digest for name, digest in listing(tmp_path / cache).items() if name != "file_hashes.json"}

    prepare_documents(tmp_path, cache="whole")
    stops = prepare_with_stops(functools.partial(prepare_documents, tmp_path, cache="stopped"))
    assert stops >= 3 and written("stopped") == written("whole")


HOSTILE = {
    "documents of one token": ["film"] * 20 + ["slow"] * 20 + ["never", "music"] * 5,
    "one huge document": ["the film was slow and never great " * 4000, "a film"],
    "tiny documents": [f"film {n % 10}" for n in range(200)],
    "unknown and special tokens": ["[UNK] " * 700 + f"film {n}" for n in range(20)]
    + ["[PAD] [SEP] film [CLS] [MASK] " * n for n in range(1, 20)],
    "two documents": ["a film", "a story"],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_becomes_rows_that_can_be_trained_on(name, tmp_path, monkeypatch, capsys):
    small_blocks(monkeypatch, 13)
    write_texts(tmp_path, HOSTILE[name])
    config, corpus, tokenizer, tokens = prepare_as_in_a_run(tmp_path, **DOCUMENTS)
    encoded = training_documents(corpus, tokenizer, tokens)
    assert tokens.train.ids.tolist() == [i for ids in encoded for i in ids]
    rows = training_rows(tokens, resolve_batch_size(config, 1))
    batches = [rows.batch(step) for step in range(rows.steps)]
    assert rows.seen(rows.steps).epochs == config.epochs
    for batch in batches:
        assert (batch.input_ids >= N_SPECIAL).any(axis=1).all() and (batch.input_ids < tokenizer.get_vocab_size()).all()
    if name == "one huge document" and max(map(len, encoded)) > LONGEST_PART:
        assert tokens.train.n_rows[0, -2] > 10  # rows of 512 tokens
    printed = capsys.readouterr().out
    assert ("skipped without a known token" in printed) == name.startswith("unknown")
    assert f"{tokens.train.n_rows[0, :2].sum()} of 8, " in printed


def damage_counts(folder):
    counts = np.load(folder / "piece_counts.npy")
    counts[0, 0, 0] += 1
    np.save(folder / "piece_counts.npy", counts)


def negative_counts(folder):
    counts = np.load(folder / "piece_counts.npy")
    counts[0, 0, :2] += [-counts[0, 0, 0] - 1, counts[0, 0, 0] + 1]
    np.save(folder / "piece_counts.npy", counts)


def change_manifest(**values):
    def change(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        damage_counts,
        negative_counts,
        lambda folder: (folder / "pieces.bin").write_bytes(b"1234567"),
        lambda folder: (folder / "piece_counts.npy").unlink(),
        lambda folder: (folder / "train.bin").write_bytes(b"12"),
        change_manifest(row_lengths=[]),
        change_manifest(row_lengths=[512, 8]),
        change_manifest(row_lengths=[1.5]),
        change_manifest(row_lengths="many"),
        change_manifest(blocks=10**12),
        change_manifest(blocks=-1),
    ],
)
def test_damaged_files_are_an_error_that_says_which_folder_to_delete(damage, tmp_path):
    tokens = prepare_documents(tmp_path)[-1]
    damage(tokens.folder)
    with pytest.raises(InputError, match="damaged.*delete"):
        prepare_documents(tmp_path)


@pytest.mark.parametrize("piece", [10**9 * SIZES + 6, 0, 7, 2**64 - 1])
def test_a_damaged_piece_is_an_error_when_it_is_read(piece, tmp_path):
    documents = prepare_documents(tmp_path)[-1].train
    damaged = Documents(documents.ids, np.full(len(documents.pieces), piece, np.uint64), documents.counts, (8,) * 7)
    with pytest.raises(InputError, match="damaged"):
        damaged.read(0, np.array([3]))
