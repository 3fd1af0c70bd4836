"""Preparation as whole processes: killed anywhere, two at once, other languages, a line of 50 MB."""

import json
import os
import random
import shutil
import subprocess
import time

import psutil
import pytest
from helpers import TIME_LIMIT, patched_script, run, small_flags, start, wait_until
from test_shards import all_rows, prepare

from microbert.data.corpus import clean
from microbert.data.tokenizer import N_SPECIAL

N_KILLS = 6
IN_SMALL_BLOCKS = """from microbert.data import corpus as documents
documents.READ_ROWS = 50
from microbert.data import prepare
from microbert.runtime import workers
prepare.BLOCK_CHARACTERS = 60_000
workers.WORTH_MEGABYTES = 0  # so that processes encode"""


def start_in_small_blocks(folder):
    flags = small_flags(
        folder, dataset="imdb", max_samples=1500, vocab_size=3000, max_seq_len=64, packing=True, prepare_only=True
    )
    return start(flags, patched_script(folder.parent / "in_small_blocks.py", IN_SMALL_BLOCKS))


def results(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".bin", ".npy")}


@pytest.mark.slow
@pytest.mark.fault(row=25)
def test_kills_at_random_times_give_the_same_results(tmp_path):
    def n_blocks():
        return len(list((tmp_path / "killed").rglob("block-*.json")))

    assert start_in_small_blocks(tmp_path / "whole").wait(TIME_LIMIT) == 0
    whole, rng, kills, blocks = results(tmp_path / "whole"), random.Random(1), 0, set()
    while kills < N_KILLS:
        process = start_in_small_blocks(tmp_path / "killed")
        wanted = n_blocks() + rng.randint(0, 6)  # and not after a time: a busy machine may not have begun by then
        while process.poll() is None and n_blocks() < wanted:
            time.sleep(0.01)
        try:
            process.communicate(timeout=rng.uniform(0, 0.2))
            assert results(tmp_path / "killed") == whole
            shutil.rmtree(tmp_path / "killed")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            blocks.add(n_blocks())
    assert len(blocks) > 2, "some of the kills have to fall while blocks are written"
    assert start_in_small_blocks(tmp_path / "killed").wait(TIME_LIMIT) == 0
    assert results(tmp_path / "killed") == whole
    assert not [
        path
        for path in (tmp_path / "killed" / "cache").rglob("*")
        if path.name.startswith("block-") or path.suffix == ".tmp"
    ]


def test_of_two_runs_at_once_one_prepares_and_the_other_waits_and_uses_it(tmp_path):
    """The first one waits in the midst of it, until the second has come."""
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
def test_a_changed_file_is_prepared_anew_and_an_unchanged_one_is_not(tmp_path):
    flags = small_flags(tmp_path, prepare_only=True)
    assert "prepared in" in run(flags).stdout
    again = run(flags).stdout
    assert "prepared in" not in again and "300 read" in again
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write('{"text": "one more document"}\n')
    changed = run(flags).stdout
    assert "prepared in" in changed and "301 read" in changed


CHINESE = (
    "我们的电影很好看故事也非常动人导演和演员都做得出色但是结尾有点慢音乐让人难忘天气冷了大家一起去城里吃饭，。！？"
)
GERMAN = [
    "Die",
    "schöne",
    "Müllerin",
    "fährt",
    "über",
    "die",
    "größte",
    "Brücke;",
    "später",
    "müßte",
    "sie",
    "zurück.",
    "Äpfel,",
    "Öl",
    "und",
    "Übermut:",
    "ein",
    "süßer",
    "Gruß",
    "aus",
    "Köln!",
    "Früh",
    "übt",
    "sich,",
    "wer",
    "höher",
    "hinaus",
    "möchte.",
    "Weiße",
    "Gänse,",
    "graue",
    "Mäuse,",
    "zwölf",
    "Boxkämpfer.",
    "Ähnliche",
    "Bäume",
    "stehen",
    "dafür",
    "draußen.",
]


def corpus_of(language, folder, n=400):
    rng = random.Random(4)
    if language == "chinese":
        texts = ["".join(rng.choices(CHINESE, k=rng.randint(20, 120))) for _ in range(n)]
    else:
        texts = [" ".join(rng.choices(GERMAN, k=rng.randint(5, 60))) for _ in range(n)]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
    )


@pytest.mark.parametrize("language", ["chinese", "german"])
def test_another_language_has_few_unknown_tokens_and_comes_back_word_for_word(language, tmp_path):
    corpus_of(language, tmp_path)
    _, corpus, tokenizer, tokens = prepare(tmp_path, vocab_size=2000, max_seq_len=4096, lowercase=False)
    assert tokens.report.unknown_rate < 0.001

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


def test_accents_go_only_where_that_is_asked_for(tmp_path):
    corpus_of("german", tmp_path)
    vocabulary = prepare(tmp_path, vocab_size=2000, strip_accents=True)[2].get_vocab()
    assert not any("ü" in token for token in vocabulary) and any("uber" in token for token in vocabulary)


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
