"""What a run prints about its corpus: counts, and warnings about unknown tokens."""

import json
import random

import pytest
from prepared import all_rows, prepare_as_in_a_run, small_blocks, write_texts

from microbert.data import blocks as blocks_module
from microbert.data import prepare as prepare_module
from microbert.data import tokenizer as tokenizer_module
from microbert.data.tokenizer import N_SPECIAL, UNK_ID


def warnings(printed):
    return [line for line in printed.splitlines() if line.startswith("warning: ")]


def test_skipped_documents_and_duplicates_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(blocks_module, "HASHES_AT_A_TIME", 30)
    monkeypatch.setattr(prepare_module, "BLOCK_ROWS", 200)
    rows = [f"document number {n % 100}" for n in range(150)]
    rows += ["", None, " \ufeff ", "\x00", "[UNK] [UNK]", "\u2060" * 3]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    counts = prepare_as_in_a_run(tmp_path)[-1].corpus_counts
    assert (counts.rows, counts.empty, counts.documents, counts.unknown, counts.duplicates) == (156, 4, 152, 2, 50)
    printed = capsys.readouterr().out
    assert "156 read" in printed and "4 empty, 2 without a known token" in printed
    assert "duplicates (kept): 50" in printed


def test_unknown_tokens_are_counted_before_documents_are_skipped_or_truncated(tmp_path, monkeypatch, capsys):
    small_blocks(monkeypatch, 20)
    monkeypatch.setattr(tokenizer_module, "SAMPLE_CHARACTERS", 200)
    known = ["plain words " * n for n in range(1, 61)]
    odd = ["\u0416\u0416"] * 30 + ["plain words " * 20 + "\u2603" * 150] * 10
    write_texts(tmp_path, known + odd)
    _, _, tokenizer, tokens = prepare_as_in_a_run(tmp_path)
    ids = [i for text in known + odd for i in tokenizer.encode(text, add_special_tokens=False).ids]
    words = [i for i in ids if not tokenizer.id_to_token(i).startswith("##")]
    counts = tokens.corpus_counts
    assert (counts.tokens, counts.unknown_tokens, counts.words) == (len(ids), ids.count(UNK_ID), len(words))
    assert (counts.unknown, counts.unknown_tokens) == (30, 30 + 10 * 2)  # a word of 150 characters is two
    assert tokens.unknown_characters == {"\u2603": 1500, "\u0436": 60}
    [warning] = warnings(capsys.readouterr().out)
    assert f"50 of {len(ids):,} tokens are unknown, and 30 of 100 documents are skipped" in warning
    assert "(U+2603, 1,500 times), \u0436 (U+0436, 60 times)" in warning and "its training sample" in warning
    assert "vocab_size" not in warning


def test_the_warning_about_unknown_tokens_names_their_cause(tmp_path, capsys):
    rng = random.Random(2)
    write_texts(tmp_path, ["".join(chr(0x4E00 + int(rng.expovariate(0.01))) for _ in range(50)) for _ in range(200)])
    prepare_as_in_a_run(tmp_path, vocab_size=105)
    [warning] = warnings(capsys.readouterr().out)
    assert "The tokenizer knows 50 characters, the most that vocab_size = 105 allows" in warning
    assert "sample" not in warning
    write_texts(tmp_path, [f"a few words {n} [UNK]" for n in range(100)])
    prepare_as_in_a_run(tmp_path)
    [warning] = warnings(capsys.readouterr().out)
    assert warning.endswith("skipped because of them. 100 of the unknown tokens are a literal [UNK] in the text")


@pytest.mark.parametrize("packing", [False, True])
def test_documents_that_begin_with_unknown_tokens_are_skipped_only_if_they_are_truncated(packing, tmp_path, capsys):
    write_texts(tmp_path, ["[UNK] " * 20 + f"word {n}" for n in range(30)] + [f"word {n}" for n in range(30)])
    _, _, _, tokens = prepare_as_in_a_run(tmp_path, packing=packing)
    counts, skipped = tokens.corpus_counts, 0 if packing else 30
    assert (counts.unknown, counts.unknown_start, counts.train + counts.held_out) == (0, skipped, 60 - skipped)
    printed = capsys.readouterr().out
    assert ("30 without a known token among their first 14" in printed) == (not packing)
    assert (counts.unknown_sequences > 0) == packing == ("skipped without a known token" in printed)
    for split in (tokens.train, tokens.held_out):
        assert len(split) and (all_rows(split) >= N_SPECIAL).any(axis=1).all()
