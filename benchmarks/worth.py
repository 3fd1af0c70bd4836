"""What is pretraining worth? Fine-tuned runs, the same models from random weights, and tf-idf, by number of labels.

    python benchmarks/worth.py runs/first                                   1,000, 5,000 and all labels, three seeds
    python benchmarks/worth.py runs/first --labels 1000 --seeds 1           a part
    python benchmarks/worth.py runs/first --json worth.json                 writes each result, and goes on from them
    python benchmarks/worth.py runs/v1 runs/v2 --max-seq-len 128            several runs, and less of each review
    python benchmarks/worth.py runs/first --choosing --epochs 8 --lr 1e-4   to compare settings, on training reviews

Uses the bundled reviews and the CPU. All models of a run read the same number of tokens of each review. Learning rate
and epochs are chosen as in `python -m microbert.finetune`, on training reviews held apart, with the first seed, for
pretrained and random weights each; the test reviews, which the runs have held out, influence nothing. With --choosing,
training reviews take the place of the test reviews. A seed decides which reviews are labelled, for every model and for
tf-idf with logistic regression, and the new weights and the order of the reviews. A row is printed as soon as it is
measured. The table has the results of this call: those that it measured, or found in the file of --json.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from checkout import new_parser
from common import machine

from microbert.config.terminal import counted
from microbert.data.labelled import LabelledTexts, read_labelled
from microbert.errors import InputError
from microbert.fill_mask import load_run
from microbert.finetune import encode_labelled, held_out, starter, tf_idf_answers, tokens_read_of_a_text
from microbert.model.build import build_model, with_max_seq_len
from microbert.runtime.files import read_json, sha256, write_json
from microbert.runtime.outcome import plain_errors
from microbert.train.choosing import choose, settle
from microbert.train.finetuning import LabelledRows, Settings, right_answers, train_classifier, with_adversarial

N_CHOOSING = 2_500  # training reviews that judge with --choosing
FIRST_SEED = 42
VERSION = 2  # of the results in a file: another one was measured with other draws of labels or another fine-tuning
PRETRAINED, RANDOM, TF_IDF = "pretrained", "random weights", "tf-idf"


@dataclasses.dataclass(frozen=True)
class Result:
    """One training, judged.

    model: hash of the run's weights, or, of tf-idf, of the test reviews. labels: number of training reviews, drawn by
    the seed. tokens: read of a review at most; 0 for all. settings: what was given, and what judged. learning_rate: for
    a 768-wide BERT. accuracy: from 0 to 1.
    """

    run: str
    model: str
    weights: str
    labels: int
    seed: int
    tokens: int
    settings: str
    learning_rate: float
    epochs: int
    accuracy: float
    tokens_read: int
    seconds: float

    @property
    def key(self) -> tuple:
        return self.run, self.model, self.weights, self.labels, self.seed, self.tokens, self.settings

    def __str__(self) -> str:
        trained = f", {self.learning_rate:g}, {counted(self.epochs, 'epoch')}" if self.weights != TF_IDF else ""
        return (
            f"{self.run or 'whole reviews'}, {self.weights}, {self.labels:,} labels{trained}, seed {self.seed}: "
            f"{self.accuracy:.2%} after {self.seconds:.0f} s"
        )


class Results:
    """The results so far, in a JSON file if there is one. used: those that this call has found or added."""

    def __init__(self, path: Path | None) -> None:
        self._path, self.all, self.used = path, list[Result](), list[Result]()
        if path is not None and path.exists():
            try:
                stored = read_json(path)
                version, self.all = stored.get("version"), [Result(**one) for one in stored["results"]]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"json = {path} does not hold results of this benchmark ({error})") from error
            if version != VERSION:
                raise InputError(f"json = {path} holds results of another version of this benchmark: use a new file")

    def find(self, *key: object) -> Result | None:
        """Return the result with this key, if it has been measured, and print it."""
        found = next((one for one in self.all if one.key == key), None)
        if found is not None:
            print(f"{found} (measured before)", flush=True)
            self.used.append(found)
        return found

    def add(self, result: Result) -> None:
        """Print and write a result."""
        print(result, flush=True)
        self.all.append(result)
        self.used.append(result)
        if self._path is not None:
            results = list(map(dataclasses.asdict, self.all))
            write_json(self._path, {"version": VERSION, "machine": machine(), "results": results})


@dataclasses.dataclass(frozen=True)
class Split:
    """tested_on: the test reviews, for the heading of the table. n_labels: of training reviews that are used."""

    train: LabelledTexts
    test: LabelledTexts
    tested_on: str
    n_labels: int

    def with_labels(self, n_labels: int | None) -> "Split":
        """Return the split with that many training reviews, or with all if they are fewer or for None."""
        n_all = len(self.train.texts)
        return dataclasses.replace(self, n_labels=n_all if n_labels is None else min(n_labels, n_all))

    @property
    def has_draws(self) -> bool:
        """Return whether the labelled reviews are a part, so that every seed has others."""
        return self.n_labels < len(self.train.texts)

    def drawn(self, seed: int) -> LabelledTexts:
        """Return the labelled reviews of a seed."""
        if not self.has_draws:
            return self.train
        return self.train.take(np.random.default_rng(seed).permutation(len(self.train.texts))[: self.n_labels])


def split_reviews(folders: list[Path], is_choosing: bool) -> Split:
    """Return the training and test reviews. Raises InputError if the runs have held out different ones."""
    texts = read_labelled("imdb", None, None, None, seed=42)
    is_held_out = held_out(texts, folders[0])
    for folder in folders[1:]:
        if (held_out(texts, folder) != is_held_out).any():
            raise InputError(f"{folders[0]} and {folder} have held out different reviews: their seeds differ")
    train, test = texts.take(~is_held_out), texts.take(is_held_out)
    if not is_choosing:
        return Split(train, test, "held-out reviews to test on", len(train.texts))
    order = np.random.default_rng(7).permutation(len(train.texts))
    train, test = train.take(order[N_CHOOSING:]), train.take(order[:N_CHOOSING])
    return Split(train, test, "training reviews to test on", len(train.texts))


def measure_run(folder: Path, split: Split, settings: Settings, seeds: list[int], results: Results) -> None:
    """Fine-tune the run and the same model from random weights with every seed, but for what has been measured."""
    encoder, tokenizer = load_run(folder)
    encoder = with_max_seq_len(encoder, settings.max_seq_len or tokens_read_of_a_text(encoder.config))
    length, model_hash = encoder.config.max_seq_len, sha256(folder / "model.safetensors")[:12]

    @functools.cache
    def encoded(seed: int | None) -> LabelledRows:
        """Return the labelled reviews of a seed, or, for None, the reviews to test on."""
        return encode_labelled(tokenizer, split.test if seed is None else split.drawn(seed), length)

    for weights in (PRETRAINED, RANDOM):
        settled: Settings | None = None
        for seed in seeds:
            key = (str(folder), model_hash, weights, split.n_labels, seed, length, described(settings, split))
            if (known := results.find(*key)) is not None:
                filled = with_adversarial(settings, known.labels)
                settled = dataclasses.replace(filled, learning_rate=known.learning_rate, epochs=known.epochs)
                continue
            start, train = time.perf_counter(), encoded(seed)
            ours = encoder if weights == PRETRAINED else build_model(encoder.config, seed)
            new = functools.partial(
                starter, ours, len(split.train.names), is_pretrained=weights == PRETRAINED, device=torch.device("cpu")
            )
            if settled is None:
                filled = with_adversarial(settings, len(train))
                choice = choose(new(settings=filled), train, filled, f"{folder}, {weights}")
                settled = settle(filled, choice)
                print(f"{folder}, {weights}, {len(train):,} labels: {choice or 'given settings'}", flush=True)
            of_seed = dataclasses.replace(settled, seed=seed)
            model = new(settings=of_seed)()
            n_tokens = train_classifier(model, train, of_seed, f"{folder}, {weights}, seed {seed}")
            accuracy = float(right_answers(model, encoded(None), settings.batch_size).mean())
            rate, epochs = of_seed.learning_rate or 0.0, of_seed.epochs or 0
            results.add(Result(*key, rate, epochs, accuracy, n_tokens, time.perf_counter() - start))


def measure_tf_idf(split: Split, seeds: list[int], results: Results) -> None:
    """Measure tf-idf with logistic regression on the labelled reviews of each seed, if scikit-learn is installed."""
    hash_of_tests = hashlib.sha256("\0".join(split.test.texts).encode()).hexdigest()[:12]
    for seed in seeds if split.has_draws else seeds[:1]:
        key = ("", hash_of_tests, TF_IDF, split.n_labels, seed, 0, split.tested_on)
        if results.find(*key) is not None:
            continue
        start = time.perf_counter()
        if (right := tf_idf_answers(split.drawn(seed), split.test)) is None:
            print("(scikit-learn is not installed: no tf-idf)")
            return
        results.add(Result(*key, 0.0, 0, float(right.mean()), 0, time.perf_counter() - start))


def described(settings: Settings, split: Split) -> str:
    """Return what judges, and the settings that are not the defaults, to tell results apart."""
    values, defaults = dataclasses.asdict(settings), dataclasses.asdict(Settings())
    given = [f"{name} = {value}" for name, value in values.items() if value != defaults[name] and name != "device"]
    return ", ".join([split.tested_on, *given])


def table(results: list[Result], folders: list[Path], labels: list[int]) -> list[str]:
    """Return the lines of a table: mean accuracy and that of each seed, and what pretraining is worth, in points."""
    lines = [f"| | {' | '.join(f'{n_labels:,} labels' for n_labels in labels)} |", "|---" * (len(labels) + 1) + "|"]

    def accuracies(run: str, weights: str, n_labels: int) -> dict[int, float]:
        """Return the accuracy by seed, in percent."""
        key = run, weights, n_labels
        return {one.seed: 100 * one.accuracy for one in results if (one.run, one.weights, one.labels) == key}

    def cell(found: dict[int, float]) -> str:
        each = f" ({' '.join(f'{share:.1f}' for share in found.values())})" if len(found) > 1 else ""
        return f"{statistics.mean(found.values()):.1f} %{each}" if found else ""

    for run in map(str, folders):
        for weights in (PRETRAINED, RANDOM):
            lines.append(f"| {run}, {weights} | {' | '.join(cell(accuracies(run, weights, one)) for one in labels)} |")
        worth = [points_gained(accuracies(run, PRETRAINED, one), accuracies(run, RANDOM, one)) for one in labels]
        lines.append(f"| pretraining is worth, in points \u00b1 standard error over seeds | {' | '.join(worth)} |")
    tf_idf = [cell(accuracies("", TF_IDF, one)) for one in labels]
    return [*lines, f"| tf-idf and logistic regression, whole reviews | {' | '.join(tf_idf)} |"]


def points_gained(pretrained: dict[int, float], random: dict[int, float]) -> str:
    """Return the mean difference by seed, and, of several seeds, its standard error. pretrained, random: by seed."""
    differences = [pretrained[seed] - random[seed] for seed in pretrained if seed in random]
    if not differences:
        return ""
    mean = f"{statistics.mean(differences):+.1f}"
    n_seeds = len(differences)
    return mean if n_seeds == 1 else f"{mean} \u00b1 {statistics.stdev(differences) / math.sqrt(n_seeds):.1f}"


def n_labels_of(text: str) -> int | None:
    """Return a number of labels; None for "all"."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 10:
        raise argparse.ArgumentTypeError(f'{text!r} is neither "all" nor a number of at least 10')
    return int(text)


def compare(arguments: argparse.Namespace) -> None:
    split, results = split_reviews(arguments.folders, arguments.choosing), Results(arguments.json)
    settings = Settings(
        **{name: getattr(arguments, name) for name in ("epochs", "learning_rate", "max_seq_len", "shrink")},
        adversarial=arguments.adversarial,
        device="cpu",
        seed=FIRST_SEED,
    )
    seeds = [FIRST_SEED + number for number in range(arguments.seeds)]
    parts = [split.with_labels(n_labels) for n_labels in arguments.labels]
    for part in parts:
        measure_tf_idf(part, seeds, results)
        for folder in arguments.folders:
            measure_run(folder, part, settings, seeds, results)
    n_test = len(split.test.texts)
    error = 100 * (0.85 * 0.15 / n_test) ** 0.5
    print(f"\n{n_test:,} {split.tested_on}: one standard error is about {error:.1f} points; {machine()}\n")
    print("\n".join(table(results.used, arguments.folders, [part.n_labels for part in parts])))


@plain_errors()
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="runs on the bundled reviews")
    parser.add_argument(
        "--labels",
        nargs="+",
        type=n_labels_of,
        default=[1000, 5000, None],
        help='numbers of training reviews, or "all"',
    )
    parser.add_argument("--seeds", type=int, default=3, help=f"number of seeds, from {FIRST_SEED} on [default: 3]")
    parser.add_argument("--epochs", type=int, help="passes over the reviews [default: chosen]")
    parser.add_argument("--learning-rate", "--lr", type=float, help="for a 768-wide BERT [default: chosen]")
    parser.add_argument("--max-seq-len", type=int, help="tokens read of each review [default: as microbert.finetune]")
    for name in ("shrink", "adversarial"):
        help_text = "as in microbert.finetune [default: the same]"
        parser.add_argument(f"--{name}", type=float, default=getattr(Settings, name), help=help_text)
    parser.add_argument("--choosing", action="store_true", help="test on training reviews, to compare settings")
    parser.add_argument("--json", type=Path, help="file of the results; those that it holds are not measured again")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
