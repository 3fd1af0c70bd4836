"""Accuracy of fine-tuned runs and of the same models from random weights, over several seeds, and of tf-idf.

    python benchmarks/finetune.py runs/v1 runs/v2 runs/v3 runs/first           three seeds
    python benchmarks/finetune.py runs/first --factors 0.5 1 2 4 --seeds 42    several learning rates
    python benchmarks/finetune.py runs/first --documents 1000                  fewer labels, the same test documents
    python benchmarks/finetune.py runs/first --max-seq-len 256 --shrink 1      more of each review, unscaled layers
    python benchmarks/finetune.py runs/first --choosing --seeds 42             to choose settings, on training reviews

Uses the bundled reviews and the CPU. The test documents are those that the runs have held out, which must be the same
for all of them; with --choosing, they are training reviews. A seed decides the classifier, the random weights and the
order of the documents. tf-idf with logistic regression has no seed.
"""

import argparse
import copy
import dataclasses
import math
import statistics
import time
from pathlib import Path

import numpy as np
from checkout import new_parser

from microbert.data.labelled import LabelledTexts, read_labelled
from microbert.errors import Diverged, InputError
from microbert.fill_mask import load_run
from microbert.finetune import held_out, tf_idf_accuracy
from microbert.model.build import build_model, with_max_seq_len
from microbert.model.classifier import encode_texts
from microbert.runtime.outcome import plain_errors
from microbert.train.finetuning import Settings, accuracy, epochs_for, new_classifier, train_classifier

N_CHOOSING = 2_500  # training reviews for --choosing, so that the held-out reviews do not influence settings


@dataclasses.dataclass(frozen=True)
class Split:
    """tested_on: the test documents, for the heading of the table."""

    train: LabelledTexts
    test: LabelledTexts
    tested_on: str


def accuracies(folder: Path, split: Split, settings: Settings, seeds: list[int], is_pretrained: bool) -> list[float]:
    """Return the accuracy with each seed, from 0 to 1; NaN if the training diverged."""
    encoder, tokenizer = load_run(folder)
    encoder = with_max_seq_len(encoder, settings.max_seq_len)
    length = encoder.config.max_seq_len
    train_rows, test_rows = (encode_texts(tokenizer, part.texts, length) for part in (split.train, split.test))
    found = []
    for seed in seeds:
        start = time.perf_counter()
        settings = dataclasses.replace(settings, seed=seed)
        weights = copy.deepcopy(encoder) if is_pretrained else build_model(encoder.config, seed)
        model = new_classifier(weights, len(split.train.names), settings, is_pretrained)
        try:
            train_classifier(model, train_rows, split.train.labels, settings, f"seed {seed}")
            found.append(accuracy(model, test_rows, split.test.labels, settings.batch_size))
        except Diverged:
            found.append(math.nan)
        print(
            f"{folder}, {'pretrained' if is_pretrained else 'random'}, {settings.learning_rate:g}, seed {seed}: "
            f"{found[-1]:.2%} after {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return found


def row(name: str, found: list[float]) -> str:
    return f"| {name} | {statistics.mean(found):.1%} | {' '.join(f'{share:.1%}' for share in found)} |"


def split_reviews(folders: list[Path], is_choosing: bool, n_documents: int | None) -> Split:
    """Return the training and test documents. Raises InputError if the runs have held out different documents."""
    texts = read_labelled("imdb", None, None, None, seed=42)
    is_held_out = held_out(texts, folders[0])
    for folder in folders[1:]:
        if (held_out(texts, folder) != is_held_out).any():
            raise InputError(f"{folders[0]} and {folder} have held out different documents: their seeds differ")
    split = Split(texts.take(~is_held_out), texts.take(is_held_out), "held out")
    if is_choosing:
        order = np.random.default_rng(7).permutation(len(split.train.texts))
        split = Split(
            split.train.take(order[N_CHOOSING:]), split.train.take(order[:N_CHOOSING]), "training ones to test on"
        )
    if n_documents is not None:
        order = np.random.default_rng(0).permutation(len(split.train.texts))
        split = dataclasses.replace(split, train=split.train.take(order[:n_documents]))
    return split


def compare(arguments: argparse.Namespace) -> None:
    split, lines = split_reviews(arguments.folders, arguments.choosing, arguments.documents), []
    for folder in arguments.folders:
        for factor in arguments.factors:
            settings = Settings(
                epochs=arguments.epochs,
                learning_rate=factor * Settings.learning_rate,
                shrink=arguments.shrink,
                max_seq_len=arguments.max_seq_len,
            )
            of_rate = f", {factor:g} x the rate" if len(arguments.factors) > 1 else ""
            for name, is_pretrained in (("pretrained", True), ("from random weights", False)):
                found = accuracies(folder, split, settings, arguments.seeds, is_pretrained)
                lines.append(row(f"{folder}, {name}{of_rate}", found))
    of_words = tf_idf_accuracy(split.train, split.test)
    print(
        f"\n{len(split.train.texts):,} reviews to train on, {len(split.test.texts):,} {split.tested_on}, "
        f"{epochs_for(settings, len(split.train.texts))} epochs\n\n| | accuracy | each seed |\n|---|---|---|"
    )
    print("\n".join(lines))
    if of_words is None:
        print("(scikit-learn is not installed: no tf-idf)")
    else:
        print(row("tf-idf and logistic regression", [of_words]))


@plain_errors()
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="runs on the bundled reviews")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument(
        "--factors", nargs="+", type=float, default=[1.0], help="multiples of microbert.finetune's learning rate"
    )
    parser.add_argument("--epochs", type=int, help="passes over the documents [default: as in microbert.finetune]")
    parser.add_argument(
        "--shrink",
        type=float,
        default=Settings.shrink,
        help=f"factor on the pretrained matrices, as in microbert.finetune [default: {Settings.shrink}]",
    )
    parser.add_argument("--max-seq-len", type=int, help="tokens read of each review [default: the run's]")
    parser.add_argument("--documents", type=int, help="training documents [default: all]")
    parser.add_argument(
        "--choosing", action="store_true", help="test on training reviews, which is right for choosing settings"
    )
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
