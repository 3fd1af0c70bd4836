"""Is my model good? Fine-tune a run as a text classifier and print its accuracy.

    python -m microbert.finetune runs/v4                                  the bundled reviews: positive or negative?
    python -m microbert.finetune runs/v4 --dataset labels.csv --text-column review --label-column stars
    python -m microbert.finetune runs/v4 --max-seq-len 256                read more of each text (rotary positions only)
    python -m microbert.finetune runs/v4 --trainable classifier           freeze the pretrained layers

Accuracy is measured on documents that neither fine-tuning nor pretraining has trained on. It is compared with the same
model from random weights, the most frequent class, and tf-idf with logistic regression if scikit-learn is installed.
The output folder loads in transformers as AutoModelForSequenceClassification. Shapes: N texts, T tokens.
"""

import dataclasses
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import typing
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from microbert.config.flags import Parser, comments_of_constants
from microbert.data.corpus import HELD_OUT_SHARE, split_hash
from microbert.data.labelled import LabelledTexts, read_labelled
from microbert.data.tokenizer import VOCABULARY
from microbert.errors import Failed, InputError
from microbert.fill_mask import load_run
from microbert.model.build import build_model, with_max_seq_len
from microbert.model.classifier import (
    WIDTH,
    TextClassifier,
    check_classifier,
    encode_texts,
    is_classifier,
    save_classifier,
)
from microbert.model.export import MODEL_FILES
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.device import choose_device, out_of_memory
from microbert.runtime.distributed import World
from microbert.runtime.files import not_writable, read_json, system_trouble
from microbert.runtime.outcome import plain_errors
from microbert.runtime.run_folder import HELD_OUT
from microbert.train.finetuning import (
    TRAINABLE,
    Settings,
    accuracy,
    epochs_for,
    matmul_dtype,
    new_classifier,
    scaled_learning_rate,
    train_classifier,
)

CHECKED_TEXTS = 8  # the saved folder must give the same logits for this many texts
SHOWN_LABELS, SHOWN_MISSING_LABELS = 10, 5


def finetune(folder: Path, settings: Settings) -> dict[str, float]:
    """Fine-tune the model in a run folder, save the classifier, compare it with baselines and print the accuracies.

    Returns the accuracies by name. Raises InputError for what the user can fix, and otherwise Failed.
    """
    output = Path(settings.output_dir or f"{folder}-finetuned")
    check_output(output, settings.overwrite)
    device, (encoder, tokenizer) = choose_device(settings.device, World.alone()), load_run(folder)
    encoder = with_max_seq_len(encoder, settings.max_seq_len)
    shape = encoder.config
    texts = read_labelled(
        settings.dataset, settings.text_column, settings.label_column, settings.max_samples, settings.seed
    )
    print(texts.source)
    train_texts, test_texts = split_texts(texts, folder, settings.dataset)
    print(_describe_texts(train_texts, test_texts))
    print(f"{folder}: {_describe_training(encoder, settings, len(train_texts.texts), device)}", flush=True)
    train_rows, test_rows = (
        encode_texts(tokenizer, part.texts, shape.max_seq_len) for part in (train_texts, test_texts)
    )

    def trained(start: MaskedLanguageModel, is_pretrained: bool, description: str) -> tuple[TextClassifier, float]:
        model = new_classifier(start, len(texts.names), settings, is_pretrained).to(device)
        train_classifier(model, train_rows, train_texts.labels, settings, description)
        return model, accuracy(model, test_rows, test_texts.labels, settings.batch_size)

    model, of_model = trained(encoder, is_pretrained=True, description="fine-tuning")
    found = {f"{folder}, fine-tuned": of_model}
    difference = save(model, tokenizer, texts.names, test_rows[:CHECKED_TEXTS], output)
    print(
        f"model: {output}, loads in transformers as AutoModelForSequenceClassification "
        f"(largest difference of the logits {difference:.1e})",
        flush=True,
    )
    if settings.baselines:
        _, found["the same from random weights"] = trained(
            build_model(shape, settings.seed), is_pretrained=False, description="from random weights"
        )
        found |= baseline_accuracies(train_texts, test_texts)
    print(f"accuracy on the {len(test_rows):,} held-out documents:")
    for name, share in found.items():
        print(f"  {name:<40} {share:.1%}")
    if settings.baselines and importlib.util.find_spec("sklearn") is None:
        print("  (to compare with tf-idf and logistic regression: pip install scikit-learn)")
    return found


def split_texts(texts: LabelledTexts, folder: Path, dataset: str) -> tuple[LabelledTexts, LabelledTexts]:
    """Return the texts to train on and those that the run in the folder has held out.

    Raises InputError if a label has no text to train on, or no text is held out.
    """
    is_held_out = held_out(texts, folder)
    train_texts, test_texts = texts.take(~is_held_out), texts.take(is_held_out)
    missing = [name for number, name in enumerate(texts.names) if number not in train_texts.labels]
    if missing or not test_texts.texts:
        shown = ", ".join(missing[:SHOWN_MISSING_LABELS])
        reason = f"no training document has the label {shown}" if missing else "no document is left to test on"
        raise InputError(
            f"{dataset}: too few documents ({len(train_texts.texts):,} to train on, "
            f"{len(test_texts.texts):,} held out): {reason}"
        )
    return train_texts, test_texts


def held_out(texts: LabelledTexts, folder: Path) -> np.ndarray:
    """Return which texts the run in this folder has, or would have, held out. bool [N].

    Without the run's record, warns and holds out a tenth, by the seed 42. Raises InputError if the record is damaged.
    """
    of_run = folder.parent / HELD_OUT  # where `folder` is a checkpoint
    path = of_run if of_run.exists() and not (folder / HELD_OUT).exists() else folder / HELD_OUT
    try:
        stored = read_json(path)
        seed, below = stored["seed"], stored["below"]
        if type(seed) is not int or type(below) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed!r}, below {below!r}")
    except FileNotFoundError:
        seed, below = 42, int(HELD_OUT_SHARE * 2**64)
        print(
            f"warning: {folder} has no {HELD_OUT}, so the documents that its run held out are unknown: "
            "holding out 10 % of the documents, chosen by the seed 42",
            file=sys.stderr,
        )
    except (OSError, ValueError, KeyError) as error:
        if system_trouble(error):
            raise
        raise InputError(f"{path} is damaged ({error})") from error
    return np.array([split_hash(text, seed) < below for text in texts.texts])


def _describe_texts(train_texts: LabelledTexts, test_texts: LabelledTexts) -> str:
    names = train_texts.names
    more = ", ..." if len(names) > SHOWN_LABELS else ""
    return (
        f"documents: {len(train_texts.texts):,} to train on, {len(test_texts.texts):,} held out; "
        f"{len(names)} labels: {', '.join(names[:SHOWN_LABELS])}{more}"
    )


def _describe_training(encoder: MaskedLanguageModel, settings: Settings, n_texts: int, device: torch.device) -> str:
    shape, n_epochs = encoder.config, epochs_for(settings, n_texts)
    in_bf16 = ", in bf16" if matmul_dtype(shape.n_embed, device) == torch.bfloat16 else ""
    return (
        f"{TRAINABLE[settings.trainable]}, on the first {shape.max_seq_len} tokens of each text, "
        f"for {n_epochs} {'epoch' if n_epochs == 1 else 'epochs'}, with learning rate "
        f"{scaled_learning_rate(settings, shape.n_embed):.3g} "
        f"({settings.learning_rate:g} x {WIDTH}/{shape.n_embed}){in_bf16}"
    )


def baseline_accuracies(train: LabelledTexts, test: LabelledTexts) -> dict[str, float]:
    """Return the accuracies that need no neural network, by name."""
    of_words = tf_idf_accuracy(train, test)
    found = {} if of_words is None else {"tf-idf and logistic regression": of_words}
    return found | {"the most frequent label": float(np.mean(test.labels == np.bincount(train.labels).argmax()))}


def tf_idf_accuracy(train: LabelledTexts, test: LabelledTexts) -> float | None:
    """Return the accuracy of logistic regression on tf-idf of words and word pairs, on whole documents.

    Returns None if scikit-learn is not installed, or if no word occurs in two documents.
    """
    if importlib.util.find_spec("sklearn") is None:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )
    try:
        return float(model.fit(train.texts, train.labels).score(test.texts, test.labels))
    except ValueError:  # "no terms remain"
        return None


def check_output(output: Path, overwrite: bool) -> None:
    """Raise InputError unless a classifier may be written to this folder. Only a classifier is ever replaced."""
    if (above := not_writable(output.absolute().parent)) is not None:
        raise InputError(f"output_dir = {str(output)!r} cannot be created: {above} is not a writable folder")
    if not output.is_symlink() and (not output.exists() or (output.is_dir() and not any(output.iterdir()))):
        return
    if output.is_symlink() or not output.is_dir() or not _is_only_classifier(output):
        raise InputError(
            f"output_dir = {str(output)!r} exists and is not a classifier, so it is not replaced: choose a new folder"
        )
    if not overwrite:
        raise InputError(
            f"output_dir = {str(output)!r} exists: --overwrite replaces it, another --output-dir keeps both"
        )


def _is_only_classifier(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return names >= MODEL_FILES and names <= MODEL_FILES | {VOCABULARY} and is_classifier(folder)


def save(
    model: TextClassifier, tokenizer: Tokenizer, names: list[str], checked_rows: np.ndarray, output: Path
) -> float:
    """Save the classifier atomically: in a temporary folder, which is reloaded, compared and renamed.

    names: of the labels. checked_rows: token ids whose logits are compared, int32 [N, T].
    Returns the largest difference of the logits. Raises Failed if the folder cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            save_classifier(model, tokenizer, names, temporary)
            difference = check_classifier(model, checked_rows, temporary)
            temporary.chmod(0o755)  # mkdtemp gives access to its owner alone
            if output.exists():
                shutil.rmtree(output)
            os.rename(temporary, output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise Failed(f"{output} cannot be written: {error.strerror or error}") from error
    return difference


def _read_flags() -> tuple[Path, Settings]:
    parser = Parser(
        prog="python -m microbert.finetune",
        usage="%(prog)s folder [--flag VALUE ...]",
        description="Fine-tune a run as a text classifier and print its accuracy.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="a finished run, such as runs/v4, or one of its checkpoints")
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    hints = {name: hint for name, hint in typing.get_type_hints(Settings).items() if name in defaults}
    source = Path(inspect.getfile(Settings)).read_text(encoding="utf-8")
    parser.add_constants(hints, defaults, comments_of_constants(source, Settings.__name__))
    values = parser.parse_constants()
    return values.pop("folder"), Settings(**values)


def main() -> None:
    with plain_errors():
        try:
            finetune(*_read_flags())
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise SystemExit(130) from None
        except RuntimeError as error:
            if not (reason := out_of_memory(error)):
                raise
            raise Failed(f"out of memory ({reason}): use a smaller batch_size or max_seq_len") from error


if __name__ == "__main__":
    main()
