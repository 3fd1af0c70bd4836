"""Preparing a corpus: this project and `datasets.map` with the same tokenizer, on the same file and cores, in one run.

    pip install -r requirements-bench.txt
    python benchmarks/prepare.py                       100 MB, three rounds
    python benchmarks/prepare.py --megabytes 1000 --rounds 1
    python benchmarks/prepare.py --megabytes 4000 --rounds 1 --only ours

The corpus is made by drawing IMDB's sentences (bundled: no network) into documents of 3 to 20 sentences, one JSON line each. The
tokenizer is trained beforehand, outside the times. Each turn is a process of its own. Ours is timed from the file to finished shards:
reading, encoding, the split, packing, counting duplicates, writing. Theirs is `map` alone, batched, from the Arrow file that
`load_dataset` has made before (outside the time), to an Arrow file of input_ids; it runs twice, with one process a core, and in
one process whose tokenizer uses all cores. The ratio is to the faster of these two.
Memory is the most that the process and its children held together (resident sets added up), sampled ten times a second.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BATCH_ROWS = 1000  # the default of datasets.map


def configure(folder: Path):
    from microbert.config.flags import read_script

    return read_script(
        ROOT / "mlm_pretrain_v2.py",
        ["--dataset", str(folder / "corpus.jsonl"), "--cache-dir", str(folder / "cache"), "--max-samples", "None"],
    )


def write_corpus(path: Path, megabytes: int) -> None:
    """Documents of random sentences of the bundled reviews, the same for every machine."""
    from microbert.config.flags import read_script
    from microbert.data.sources import open_corpus

    corpus = open_corpus(read_script(ROOT / "mlm_pretrain_v1.py", []))
    print(corpus.summary)
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

    config = configure(folder)
    corpus = open_corpus(config)
    print(corpus.summary)
    with lock_cache(corpus, config):
        save_tokenizer(get_tokenizer(corpus, config, lambda: None), folder, config.max_seq_len)


def ours(folder: Path) -> float:
    from microbert.data.prepare import prepare_tokens
    from microbert.data.sources import lock_cache, open_corpus
    from microbert.data.tokenizer import get_tokenizer

    config = configure(folder)
    corpus = open_corpus(config)
    print(corpus.summary)
    with lock_cache(corpus, config):
        tokenizer = get_tokenizer(corpus, config, lambda: None)
        begin = time.perf_counter()
        tokens = prepare_tokens(corpus, tokenizer, config, lambda: None)
        seconds = time.perf_counter() - begin
    for path in tokens.folder.iterdir():  # so that the next turn does the work again
        path.unlink()
    return seconds


def theirs(folder: Path, n_processes: int) -> float:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()  # it warns of texts longer than the model takes
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "corpus.jsonl"), split="train", cache_dir=str(folder / "arrow")
    )
    datasets.disable_caching()  # so that each turn does the work again

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
    import psutil

    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def turn(side: str, folder: Path, n_processes: int) -> tuple[float, float]:
    """Seconds and GB of one turn, in a process of its own."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["ours"], help="leave the other side out")
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", arguments.megabytes)
        train_tokenizer(folder)
        results: dict[str, list[tuple[float, float]]] = {label: [] for *_, label in sides}
        for number in range(arguments.rounds):
            for side, n_processes, label in sides:
                results[label].append(turn(side, folder, n_processes))
                print(
                    f"round {number + 1}, {label}: {arguments.megabytes / results[label][-1][0]:.1f} MB/s, {results[label][-1][1]:.2f} GB",
                    flush=True,
                )
    print(f"\n{arguments.megabytes} MB, {n_cores} cores, {arguments.rounds} rounds (medians of MB/s, largest GB)")
    for label, turns in results.items():
        print(
            f"{label:20} {statistics.median(arguments.megabytes / seconds for seconds, _ in turns):8.1f} MB/s {max(peak for _, peak in turns):6.2f} GB"
        )
    if not arguments.only:
        ratios = [
            min(
                seconds for label, turns in results.items() if label != "this project" for seconds, _ in [turns[number]]
            )
            / results["this project"][number][0]
            for number in range(arguments.rounds)
        ]
        print(
            f"ratio to the faster of the others: {statistics.median(ratios):.1f} x ({min(ratios):.1f} to {max(ratios):.1f})"
        )


if __name__ == "__main__":
    main()
