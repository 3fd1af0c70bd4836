"""How well runs can be fine-tuned: accuracy of each, and of the same models from random weights, over several seeds, beside tf-idf with logistic regression.

    python benchmarks/finetune.py runs/v1 runs/v2 runs/v3 runs/first           three seeds of the classifier, of the random weights and of the order
    python benchmarks/finetune.py runs/first --factors 0.5 1 2 4 --seeds 42    several learning rates, as multiples of microbert.finetune's
    python benchmarks/finetune.py runs/first --documents 1000                  with fewer labels, judged on as many documents
    python benchmarks/finetune.py runs/first --max-seq-len 256 --shrink 1      reading more of each review, and from the layers as pretraining has left them
    python benchmarks/finetune.py runs/first --choosing --seeds 42             to choose settings by: judged on training reviews held apart

On the bundled reviews and the CPU, judged on those that the runs have held out, which have to be the same for all, but with --choosing. tf-idf has no seed.
"""

import argparse
import copy
import dataclasses
import math
import statistics
import time
from pathlib import Path

import common  # noqa: F401  so that the package is found
import numpy as np

from microbert.data.labelled import LabelledTexts, read_labelled
from microbert.errors import Diverged, InputError
from microbert.fill_mask import load_run
from microbert.finetune import Settings, accuracy_of, epochs_of, held_out, new_classifier, tf_idf_accuracy, train
from microbert.model.build import build_model, with_max_seq_len
from microbert.model.classifier import encode_texts
from microbert.runtime.outcome import plain_errors

N_CHOOSING = (
    2_500  # training reviews to choose settings by, so that those which the runs have held out have no part in it
)


def accuracies(
    folder: Path,
    train_texts: LabelledTexts,
    test_texts: LabelledTexts,
    settings: Settings,
    seeds: list[int],
    is_pretrained: bool,
) -> list[float]:
    """On test_texts, of each seed, from 0 to 1; NaN where the training diverged."""
    encoder, tokenizer = load_run(folder)
    encoder = with_max_seq_len(encoder, settings.max_seq_len)
    train_rows, test_rows = (
        encode_texts(tokenizer, part.texts, encoder.config.max_seq_len) for part in (train_texts, test_texts)
    )
    found = []
    for seed in seeds:
        start = time.perf_counter()
        settings = dataclasses.replace(settings, seed=seed)
        model = new_classifier(
            copy.deepcopy(encoder) if is_pretrained else build_model(encoder.config, seed),
            len(train_texts.names),
            settings,
            is_pretrained,
        )
        try:
            train(model, train_rows, train_texts.labels, settings, f"seed {seed}")
            found.append(accuracy_of(model, test_rows, test_texts.labels, settings.batch_size))
        except Diverged:
            found.append(math.nan)
        print(
            f"{folder}, {'pretrained' if is_pretrained else 'random'}, {settings.learning_rate:g}, seed {seed}: {found[-1]:.2%} after {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return found


def row(name: str, found: list[float]) -> str:
    return f"| {name} | {statistics.mean(found):.1%} | {' '.join(f'{accuracy:.1%}' for accuracy in found)} |"


def compare(arguments: argparse.Namespace) -> None:
    """Raises InputError where the folders are none of runs with one split."""
    texts, lines = read_labelled("imdb", None, None, None, seed=42), []
    is_held_out = held_out(texts, arguments.folders[0])
    for folder in arguments.folders[1:]:
        if (held_out(texts, folder) != is_held_out).any():
            raise InputError(f"{arguments.folders[0]} and {folder} have held out other documents: their seeds differ")
    train_texts, test_texts, judged_on = texts.take(~is_held_out), texts.take(is_held_out), "held out"
    if arguments.choosing:
        order = np.random.default_rng(7).permutation(len(train_texts.texts))
        train_texts, test_texts, judged_on = (
            train_texts.take(order[N_CHOOSING:]),
            train_texts.take(order[:N_CHOOSING]),
            "of the training ones held apart",
        )
    if arguments.documents is not None:
        train_texts = train_texts.take(
            np.random.default_rng(0).permutation(len(train_texts.texts))[: arguments.documents]
        )
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
                lines.append(
                    row(
                        f"{folder}, {name}{of_rate}",
                        accuracies(folder, train_texts, test_texts, settings, arguments.seeds, is_pretrained),
                    )
                )
    of_words = tf_idf_accuracy(train_texts, test_texts)
    print(
        f"\n{len(train_texts.texts):,} reviews to train on, {len(test_texts.texts):,} {judged_on}, {epochs_of(settings, len(train_texts.texts))} epochs\n\n| | accuracy | each seed |\n|---|---|---|"
    )
    print("\n".join(lines))
    print(
        "(scikit-learn is not installed: no tf-idf)"
        if of_words is None
        else row("tf-idf and logistic regression", [of_words])
    )


@plain_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="runs on the bundled reviews")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--factors", nargs="+", type=float, default=[1.0], help="of microbert.finetune's learning rate")
    parser.add_argument("--epochs", type=int, help="as in microbert.finetune, unless given")
    parser.add_argument(
        "--shrink", type=float, default=Settings.shrink, help="of the layers' matrices, as in microbert.finetune"
    )
    parser.add_argument("--max-seq-len", type=int, help="tokens of a review; the runs', unless given")
    parser.add_argument("--documents", type=int, help="to train on; all, unless given")
    parser.add_argument(
        "--choosing",
        action="store_true",
        help="judges on training reviews held apart: what settings are to be chosen by",
    )
    arguments = parser.parse_args()
    compare(arguments)


if __name__ == "__main__":
    main()
