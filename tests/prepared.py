"""Small corpora and their preparation for the tests."""

import json
import random

import numpy as np
from configs import configure, resolve
from helpers import write_corpus

from microbert.data import prepare as prepare_module
from microbert.data.prepare import prepare_corpus, prepare_tokens
from microbert.data.sources import lock_cache, open_corpus
from microbert.data.tokenizer import get_tokenizer
from microbert.errors import Stopped
from microbert.runtime.run import Run

CHINESE = (
    "我们的电影很好看故事也非常动人导演和演员都做得出色但是结尾有点慢音乐让人难忘天气冷了大家一起去城里吃饭，。！？"
)
GERMAN = (
    "Die schöne Müllerin fährt über die größte Brücke; später müßte sie zurück. Äpfel, Öl und Übermut: "
    "ein süßer Gruß aus Köln! Früh übt sich, wer höher hinaus möchte. Weiße Gänse, graue Mäuse, zwölf "
    "Boxkämpfer. Ähnliche Bäume stehen dafür draußen."
)


def prepare_with_stops(prepare):
    """Call prepare(check_stop=...) again and again until no random stop ends it. Return the number of stops."""
    stops, rng = 0, random.Random(3)

    def stop_now_and_then():
        if rng.random() < 0.12:
            raise Stopped("test")

    while True:
        try:
            prepare(check_stop=stop_now_and_then)
            return stops
        except Stopped:
            stops += 1


def small_config(folder, cache="cache", **constants):
    """Return a configuration for the corpus in `folder`, which is written if it is missing."""
    if not (folder / "corpus.jsonl").exists():
        write_corpus(folder / "corpus.jsonl")
    constants = {"max_seq_len": 16, "vocab_size": 200, **constants}
    return configure("--dataset", str(folder / "corpus.jsonl"), "--cache-dir", str(folder / cache), **constants)


def prepare(folder, cache="cache", check_stop=lambda: None, **constants):
    """Prepare the corpus in `folder`. Returns configuration, corpus, tokenizer and tokens."""
    config = small_config(folder, cache, **constants)
    corpus = open_corpus(config, lambda: None)
    with lock_cache(corpus, config, lambda: None):
        tokenizer = get_tokenizer(corpus, config)
        return config, corpus, tokenizer, prepare_tokens(corpus, tokenizer, config, check_stop)


def prepare_as_in_a_run(folder, **constants):
    """Prepare the corpus in `folder` with the output of a run. Returns the same as `prepare`."""
    config = small_config(folder, **constants)
    run = Run(config, folder / "run")
    run.config = resolve(config)
    return config, *prepare_corpus(run)


def all_rows(sequences):
    """Return all sequences of a split, int64 [N, T]."""
    return sequences.read(np.arange(len(sequences)))


def write_texts(folder, texts):
    """Write the texts as the corpus in `folder`."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")


def small_blocks(monkeypatch, rows):
    """Make blocks of this number of rows."""
    monkeypatch.setattr(prepare_module, "BLOCK_ROWS", rows)
    monkeypatch.setattr("microbert.data.file_formats.READ_ROWS", rows)


def write_texts_in(language, folder, n=400):
    """Write random texts in "chinese" or "german" as the corpus in `folder`."""
    rng = random.Random(4)
    if language == "chinese":
        texts = ["".join(rng.choices(CHINESE, k=rng.randint(20, 120))) for _ in range(n)]
    else:
        texts = [" ".join(rng.choices(GERMAN.split(), k=rng.randint(5, 60))) for _ in range(n)]
    write_texts(folder, texts)
