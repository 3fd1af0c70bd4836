"""Preparation of a corpus: this project against `datasets.map` with the same tokenizer, on the same file and cores.

    pip install -r requirements-bench.txt
    python benchmarks/prepare.py                       100 MB, three rounds
    python benchmarks/prepare.py --megabytes 1000 --rounds 1
    python benchmarks/prepare.py --megabytes 4000 --rounds 1 --only ours

The corpus consists of IMDB's sentences (bundled: no network), drawn into documents of 3 to 20 sentences, one JSON line
each. The tokenizer is trained before, outside the times. Each turn is a separate process. This project's time runs from
the file to finished shards: reading, encoding, the split, packing, counting duplicates, writing. The other time is that
of `map` alone, batched, from the Arrow file of `load_dataset` (outside the time) to an Arrow file of input_ids. It runs
twice: with one process per core, and in one process whose tokenizer uses all cores. The ratio is to the faster of these
two. Memory is the peak of the process and its children together (sum of resident sets), sampled ten times a second.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from checkout import ROOT, new_parser

BATCH_ROWS = 1000  # the default of datasets.map


# The functions below import what they use, so that a turn's process loads only the libraries of its own side.


def corpus_config(folder: Path):
    """Return v2's Config for the corpus in the folder."""
    from microbert.config.flags import read_script

    return read_script(
        ROOT / "mlm_pretrain_v2.py",
        ["--dataset", str(folder / "corpus.jsonl"), "--cache-dir", str(folder / "cache"), "--max-samples", "None"],
    )


def write_corpus(path: Path, megabytes: int) -> None:
    """Write documents of random sentences of the bundled reviews, the same on every machine."""
    from common import script_config

    from microbert.data.sources import open_corpus

    corpus = open_corpus(script_config("v1"))
    sentences = [sentence for rows, _ in corpus.read() for row in rows for sentence in re.split(r"(?<=[.!?])\s+", row)]
    rng, size = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = " ".join(rng.choices(sentences, k=rng.randint(3, 20)))
            size += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def train_tokenizer(folder: Path) -> None:
    from microbert.data.sources import lock_cache, open_corpus
    from microbert.data.tokenizer import get_tokenizer, save_tokenizer

    config = corpus_config(folder)
    corpus = open_corpus(config)
    with lock_cache(corpus, config):
        save_tokenizer(get_tokenizer(corpus, config), folder, config.max_seq_len)


def ours(folder: Path) -> float:
    """Return the seconds of this project's preparation."""
    from microbert.data.prepare import prepare_tokens
    from microbert.data.sources import lock_cache, open_corpus
    from microbert.data.tokenizer import get_tokenizer

    config = corpus_config(folder)
    corpus = open_corpus(config)
    with lock_cache(corpus, config):
        tokenizer = get_tokenizer(corpus, config)
        begin = time.perf_counter()
        tokens = prepare_tokens(corpus, tokenizer, config)
        seconds = time.perf_counter() - begin
    for path in tokens.folder.iterdir():  # the next turn prepares them again
        path.unlink()
    return seconds


def theirs(folder: Path, n_processes: int) -> float:
    """Return the seconds of `datasets.map`."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()  # hides warnings about texts longer than the model's maximum
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "corpus.jsonl"), split="train", cache_dir=str(folder / "arrow")
    )
    datasets.disable_caching()  # each turn prepares again

    def encode(batch):
        return tokenizer(
            batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )

    begin = time.perf_counter()
    rows.map(
        encode,
        batched=True,
        batch_size=BATCH_ROWS,
        remove_columns=rows.column_names,
        num_proc=n_processes if n_processes > 1 else None,
    )
    return time.perf_counter() - begin


def tree_bytes(process) -> int:
    """Return the resident memory of a psutil process and its children."""
    import psutil

    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def turn(side: str, folder: Path, n_processes: int) -> tuple[float, float]:
    """Return the seconds and the peak memory in GB of one turn, in a process of its own."""
    import psutil

    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false" if n_processes > 1 else "true",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, "--child", side, "--folder", str(folder), "--processes", str(n_processes)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak, watched = [0], psutil.Process(child.pid)

    def watch() -> None:
        while child.poll() is None:
            peak[0] = max(peak[0], tree_bytes(watched))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = child.communicate()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"the turn of {side} failed")
    return float(output.splitlines()[-1]), peak[0] / 1e9


def print_table(results: dict[str, list[tuple[float, float]]], megabytes: int) -> None:
    """results: seconds and GB of each turn, by side; this project first."""
    for label, turns in results.items():
        speed = statistics.median(megabytes / seconds for seconds, _ in turns)
        print(f"{label:20} {speed:8.1f} MB/s {max(peak for _, peak in turns):6.2f} GB")
    ours_turns, *other_turns = results.values()
    if other_turns:
        from common import median_and_range

        ratios = [
            min(seconds for seconds, _ in others) / own
            for (own, _), *others in zip(ours_turns, *other_turns, strict=True)
        ]
        print(f"ratio to the faster of the others: {median_and_range(ratios)}")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["ours"], help="skip the other side")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder = Path(arguments.folder)
        print(ours(folder) if arguments.child == "ours" else theirs(folder, arguments.processes))
        return

    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sides = [("ours", 1, "this project")]
    if not arguments.only:
        sides += [("theirs", n_cores, f"map, {n_cores} processes"), ("theirs", 1, "map, one process")]
    results: dict[str, list[tuple[float, float]]] = {label: [] for *_, label in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", arguments.megabytes)
        train_tokenizer(folder)
        for number in range(arguments.rounds):
            for side, n_processes, label in sides:
                seconds, peak = turn(side, folder, n_processes)
                results[label].append((seconds, peak))
                print(
                    f"round {number + 1}, {label}: {arguments.megabytes / seconds:.1f} MB/s, {peak:.2f} GB", flush=True
                )
    print(f"\n{arguments.megabytes} MB, {n_cores} cores, {arguments.rounds} rounds (medians of MB/s, largest GB)")
    print_table(results, arguments.megabytes)


if __name__ == "__main__":
    main()
