"""Preparation: splits, counts and keys, and whole processes that are killed, start at once or read hostile text."""

import functools
import json
import os
import random
import shutil
import time

import numpy as np
import psutil
import pytest
from helpers import (
    TIME_LIMIT,
    end_of,
    fork,
    listing,
    patched_script,
    run,
    small_flags,
    start,
    wait_until,
    write_corpus,
)
from prepared import all_rows, prepare, prepare_with_stops, write_texts, write_texts_in

from microbert.data import prepare as prepare_module
from microbert.data import sources
from microbert.data.corpus import clean
from microbert.data.tokenizer import N_SPECIAL
from microbert.errors import InputError
from microbert.runtime import workers

N_KILLS = 6


def test_at_most_about_ten_thousand_documents_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "HELD_OUT_AT_MOST", 20)
    counts = prepare(write_corpus(tmp_path / "corpus.jsonl", 2000).parent)[-1].corpus_counts
    assert 8 <= counts.held_out <= 35 and counts.train == 2000 - counts.held_out


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_tiny_corpus_holds_out_at_least_one_document(n, tmp_path):
    (tmp_path / "corpus.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(n)))
    counts = prepare(tmp_path)[-1].corpus_counts
    assert 1 <= counts.held_out < n and counts.train + counts.held_out == n


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_per_token_is_converted_to_bits_per_byte_of_all_text(packing, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BLOCK_ROWS", 10)
    # some texts are longer than a sequence, and all have more bytes than characters
    texts = [f"größe number {n} " * (1 + n % 40) for n in range(50)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    _, _, tokenizer, tokens = prepare(tmp_path, packing=packing)
    n_tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    n_bytes = sum(len(clean(text).encode()) for text in texts)
    assert n_bytes > tokens.corpus_counts.characters
    assert tokens.corpus_counts.bits_per_byte(np.log(2)) == pytest.approx(n_tokens / n_bytes)


def test_duplicates_are_in_the_same_split(tmp_path):
    lines = [json.dumps({"text": f"document number {n % 50}"}) for n in range(200)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    tokens = prepare(tmp_path)[-1]
    train, held_out = ({tuple(row) for row in all_rows(split)} for split in (tokens.train, tokens.held_out))
    assert train and held_out and not train & held_out


def test_a_preparation_stopped_anywhere_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BLOCK_ROWS", 30)
    monkeypatch.setattr("microbert.data.file_formats.READ_ROWS", 10)

    def written(cache):  # file_hashes.json is only written if the corpus has not changed for some seconds
        return {name: digest for name, digest in listing(tmp_path / cache).items() if name != "file_hashes.json"}

    prepare(tmp_path, cache="whole", packing=True)
    stops = prepare_with_stops(functools.partial(prepare, tmp_path, cache="stopped", packing=True))
    assert stops >= 3
    assert written("stopped") == written("whole")


def test_the_key_contains_what_determines_the_tokens(tmp_path):
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
def test_a_version_with_other_blocks_has_another_key(constant, tmp_path, monkeypatch):
    before = prepare(tmp_path)[-1].key
    monkeypatch.setattr(prepare_module, constant, 100)
    assert prepare(tmp_path)[-1].key != before


@pytest.mark.parametrize("lengths", [(500,), (40, 160), (101,)])
def test_text_without_spaces_of_any_length_is_encoded(lengths, tmp_path):
    rng = random.Random(1)
    write_texts(tmp_path, ["".join(rng.choices("ACGT", k=rng.choice(lengths))) for _ in range(100)])
    _, _, _, tokens = prepare(tmp_path, vocab_size=300)
    counts = tokens.corpus_counts
    assert (counts.train + counts.held_out, counts.unknown, counts.unknown_tokens) == (100, 0, 0)
    assert counts.tokens > 100 * min(lengths) / 10


def test_text_from_which_nothing_can_be_held_out_is_refused_with_the_reason(tmp_path):
    write_texts(tmp_path, ["[UNK] " * 20 + f"word {n}" for n in range(30)] + ["word"])
    reason = "two different documents.*31 read, 1 used; skipped: 30 without a known token among their first 14"
    with pytest.raises(InputError, match=reason):
        prepare(tmp_path)


def in_small_blocks():
    sources.READ_ROWS = prepare_module.READ_ROWS = 50
    prepare_module.BLOCK_CHARACTERS = 60_000
    workers.WORTH_MEGABYTES = 0  # encode in processes


def fork_in_small_blocks(folder):
    flags = small_flags(
        folder, dataset="imdb", max_samples=1500, vocab_size=3000, max_seq_len=64, packing=True, prepare_only=True
    )
    return fork(flags, folder.parent / "log", in_small_blocks)


def results(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".bin", ".npy")}


@pytest.mark.slow
@pytest.mark.fault(row=25)
def test_kills_at_random_times_do_not_change_the_result(tmp_path):
    def n_blocks():
        return len(list((tmp_path / "killed").rglob("block-*.json")))

    (tmp_path / "whole").mkdir()
    assert end_of(fork_in_small_blocks(tmp_path / "whole")) == 0
    whole, rng, kills, blocks = results(tmp_path / "whole"), random.Random(1), 0, set()
    while kills < N_KILLS:
        (tmp_path / "killed").mkdir(exist_ok=True)
        process = fork_in_small_blocks(tmp_path / "killed")
        wanted = n_blocks() + rng.randint(0, 6)  # blocks, not seconds: a busy machine may not have begun by then
        while process.is_alive() and n_blocks() < wanted:
            time.sleep(0.01)
        process.join(rng.uniform(0, 0.2))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            blocks.add(n_blocks())
        else:
            assert end_of(process) == 0 and results(tmp_path / "killed") == whole
            shutil.rmtree(tmp_path / "killed")
    assert len(blocks) > 2, "some kills must occur while blocks are written"
    assert end_of(fork_in_small_blocks(tmp_path / "killed")) == 0
    assert results(tmp_path / "killed") == whole
    assert not [
        path
        for path in (tmp_path / "killed" / "cache").rglob("*")
        if path.name.startswith("block-") or path.suffix == ".tmp"
    ]


@pytest.mark.slow
def test_the_second_of_two_simultaneous_runs_waits_and_uses_what_the_first_prepares(tmp_path):
    """The first run pauses while it prepares, until the second has started."""
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    patch = f"""import microbert.data.prepare as prepare
real = prepare.prepare_tokens
def patient(*arguments):
    open({str(begun)!r}, "w")
    while not os.path.exists({str(go_on)!r}):
        time.sleep(0.01)
    return real(*arguments)
prepare.prepare_tokens = patient"""
    flags = small_flags(tmp_path, prepare_only=True)
    first = start(flags, patched_script(tmp_path / "patient.py", patch))
    wait_until(begun.exists, first)
    second = start([*flags, "--output-dir", str(tmp_path / "second")], env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        while "waiting for another run" not in (line := second.stdout.readline()):
            assert line, second.stderr.read()
    finally:
        go_on.touch()
    (output, errors), (others, _) = (process.communicate(timeout=TIME_LIMIT) for process in (first, second))
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert "prepared in" in output and "prepared in" not in others
    assert "300 read" in output and "300 read" in others


@pytest.mark.fault(row=25)
def test_only_a_changed_file_is_prepared_again(tmp_path):
    flags = small_flags(tmp_path, prepare_only=True)
    assert "prepared in" in run(flags).stdout
    again = run(flags).stdout
    assert "prepared in" not in again and "300 read" in again
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write('{"text": "one more document"}\n')
    changed = run(flags).stdout
    assert "prepared in" in changed and "301 read" in changed


@pytest.mark.parametrize("language", ["chinese", "german"])
def test_other_languages_have_few_unknown_tokens_and_decode_to_the_same_words(language, tmp_path):
    write_texts_in(language, tmp_path)
    _, corpus, tokenizer, tokens = prepare(tmp_path, vocab_size=2000, max_seq_len=4096, lowercase=False)
    assert tokens.corpus_counts.unknown_rate < 0.001

    def words(text):
        return tuple(
            word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        )

    documents = {words(clean(row)) for rows, _ in corpus.read() for row in rows}
    decoded = {
        words(tokenizer.decode([i for i in row if i >= N_SPECIAL]))
        for split in (tokens.train, tokens.held_out)
        for row in all_rows(split).tolist()
    }
    assert decoded == documents
    assert {"chinese": "电", "german": "Müllerin"}[language] in {word for document in decoded for word in document}


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.fault(row=27)
@pytest.mark.slow
def test_a_line_of_fifty_megabytes_is_read_in_bounded_memory(kind, tmp_path):
    rng = random.Random(6)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 12))) for _ in range(5000)]
    line = " ".join(rng.choices(words, k=7_000_000))
    path = tmp_path / f"long.{kind}"
    lines = [line, "x" * 5_000_000, "a short line", "and one more"]
    path.write_text("".join((json.dumps({"text": text}) if kind == "jsonl" else text) + "\n" for text in lines))
    assert len(line) > 50_000_000
    process = start(
        small_flags(tmp_path, dataset=path, packing=True, prepare_only=True, max_seq_len=128, vocab_size=5000)
    )
    peak, handle = 0, psutil.Process(process.pid)
    deadline = time.monotonic() + TIME_LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            peak = max(peak, handle.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.02)
    output, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0, errors
    assert "4 read" in output
    assert peak < 1.5e9, f"{peak / 1e9:.2f} GB"
