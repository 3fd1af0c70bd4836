"""Is my model good? Fine-tune a run as a text classifier and print its accuracy.

    python -m microbert.finetune runs/v4                                  the bundled reviews: positive or negative?
    python -m microbert.finetune runs/v4 --dataset labels.csv --text-column review --label-column stars
    python -m microbert.finetune runs/v4 --max-seq-len 128                read less of each text, which takes less time
    python -m microbert.finetune runs/v4 --epochs 3 --lr 5e-5             take these, and choose nothing
    python -m microbert.finetune runs/v4 --trainable classifier           freeze the pretrained layers

Accuracy is measured on documents that neither fine-tuning nor pretraining has trained on. It is compared with the same
model from random weights, the most frequent class, and tf-idf with logistic regression if scikit-learn is installed.
Learning rate and epochs are chosen on training documents held apart, for the random weights too (train/choosing.py).
Each accuracy is printed as soon as it is measured.
The output folder loads in transformers as AutoModelForSequenceClassification. Shapes: N texts, T tokens.
"""

import copy
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
from microbert.config.terminal import counted
from microbert.data.corpus import HELD_OUT_SHARE, split_hash
from microbert.data.labelled import LabelledTexts, read_labelled
from microbert.data.tokenizer import VOCABULARY
from microbert.errors import Failed, InputError
from microbert.fill_mask import load_run
from microbert.model.build import ROTARY, build_model, with_max_seq_len
from microbert.model.classifier import (
    WIDTH,
    TextClassifier,
    check_classifier,
    encode_texts,
    is_classifier,
    save_classifier,
)
from microbert.model.export import MODEL_FILES
from microbert.model.layers import MaskedLanguageModel, ModelConfig
from microbert.runtime.commands import plain_device_errors
from microbert.runtime.device import choose_device
from microbert.runtime.distributed import World
from microbert.runtime.files import not_writable, read_json, system_trouble
from microbert.runtime.run_folder import HELD_OUT
from microbert.train.choosing import Start, choose, most_epochs, most_tokens, settle
from microbert.train.finetuning import (
    TRAINABLE,
    LabelledRows,
    Settings,
    matmul_dtype,
    new_classifier,
    passes_of_a_step,
    right_answers,
    train_classifier,
    with_adversarial,
)

WHOLE_TEXT = 512  # tokens: the longest part of a text that is read unless max_seq_len is given
FROM_RANDOM = "the same from random weights"
CHECKED_TEXTS = 8  # the saved folder must give the same logits for this many texts
SHOWN_LABELS, SHOWN_MISSING_LABELS = 10, 5
FEWEST_TO_COMPARE = 30  # held-out texts: of fewer, the standard error says nothing
CERTAIN = 2  # standard errors of a difference that is more than chance


def finetune(folder: Path, settings: Settings) -> dict[str, float]:
    """Fine-tune the model in a run folder, save the classifier, compare it with baselines and print the accuracies.

    Returns the accuracies by name. Raises InputError for what the user can fix, and otherwise Failed.
    """
    output = Path(settings.output_dir or f"{folder}-finetuned")
    check_output(output, settings.overwrite)
    device, (encoder, tokenizer) = choose_device(settings.device, World.alone()), load_run(folder)
    encoder = with_max_seq_len(encoder, settings.max_seq_len or tokens_read_of_a_text(encoder.config))
    texts = read_labelled(
        settings.dataset, settings.text_column, settings.label_column, settings.max_samples, settings.seed
    )
    print(texts.source)
    train_texts, test_texts = split_texts(texts, folder, settings.dataset)
    print(_describe_texts(train_texts, test_texts))
    train, test = (encode_labelled(tokenizer, part, encoder.config.max_seq_len) for part in (train_texts, test_texts))
    settings = with_adversarial(settings, len(train))
    print(f"{folder}: {_describe_training(encoder, settings, train, device)}", flush=True)

    def fitted(start: MaskedLanguageModel, is_pretrained: bool, description: str) -> tuple[TextClassifier, np.ndarray]:
        new = starter(start, len(texts.names), settings, is_pretrained, device)
        choice = choose(new, train, settings, description)
        if choice is not None:
            print(f"{description}: {choice}; {choice.tokens_read:,} tokens read", flush=True)
        settled, model = settle(settings, choice), new()
        n_tokens = train_classifier(model, train, settled, description)
        print(f"{description}: {counted(settled.epochs or 0, 'epoch')}, {n_tokens:,} tokens read", flush=True)
        return model, right_answers(model, test, settings.batch_size)

    model, of_model = fitted(encoder, is_pretrained=True, description="fine-tuning")
    name = f"{folder}, fine-tuned"
    print(f"accuracy on {counted(len(test), 'held-out document')}, and its standard error:")
    _print_accuracy(name, of_model)
    difference = save(model, tokenizer, texts.names, test.rows[:CHECKED_TEXTS], output)
    print(
        f"model: {output}, loads in transformers as AutoModelForSequenceClassification "
        f"(largest difference of the logits {difference:.1e})",
        flush=True,
    )
    right = {name: of_model}
    if settings.baselines:
        for one, answers in baseline_answers(train_texts, test_texts).items():  # first: random weights take long
            _print_accuracy(one, answers)
            right[one] = answers
        if importlib.util.find_spec("sklearn") is None:
            print("(to compare with tf-idf and logistic regression: pip install scikit-learn)")
        random_encoder = build_model(encoder.config, settings.seed)
        _, right[FROM_RANDOM] = fitted(random_encoder, is_pretrained=False, description="from random weights")
        _print_accuracy(FROM_RANDOM, right[FROM_RANDOM])
        print(worth_of_pretraining(of_model, right[FROM_RANDOM]))
    return {name: float(answers.mean()) for name, answers in right.items()}


def tokens_read_of_a_text(shape: ModelConfig) -> int:
    """Return the default of max_seq_len: WHOLE_TEXT where positions are rotary, otherwise the run's positions."""
    return WHOLE_TEXT if shape.arch in ROTARY else min(WHOLE_TEXT, shape.max_seq_len)


def encode_labelled(tokenizer: Tokenizer, texts: LabelledTexts, max_seq_len: int) -> LabelledRows:
    """Return the first tokens of each text, with its label."""
    return LabelledRows(encode_texts(tokenizer, texts.texts, max_seq_len), texts.labels)


def starter(
    encoder: MaskedLanguageModel, n_classes: int, settings: Settings, is_pretrained: bool, device: torch.device
) -> Start:
    """Return a function that returns a new classifier on a copy of the encoder, before its first step."""
    return lambda: new_classifier(copy.deepcopy(encoder), n_classes, settings, is_pretrained).to(device)


def _print_accuracy(name: str, right: np.ndarray) -> None:
    """Print a row of the table. right: which of the held-out documents the model gets right, bool [N]."""
    print(f"  {name:<40} {right.mean():.1%} \u00b1 {standard_error(right):.1%}", flush=True)


def worth_of_pretraining(pretrained: np.ndarray, random: np.ndarray) -> str:
    """Return how many points pretraining is worth, and what to try unless it helps.

    It helps or hurts if the difference is CERTAIN standard errors of the difference on the same documents.
    pretrained, random: which documents the model gets right, bool [N].
    """
    difference = pretrained.astype(float) - random
    points, error = 100 * difference.mean(), 100 * standard_error(difference)
    found = f"{points:+.1f} points \u00b1 {error:.1f} compared with random weights"
    if len(difference) < FEWEST_TO_COMPARE:
        return (
            f"unclear: too few texts to tell whether pretraining helps ({len(difference)} held out, "
            f"at least {FEWEST_TO_COMPARE} are needed)"
        )
    if points > 0 and points >= CERTAIN * error:
        return f"pretraining helps: {found}"
    advice = "Try a longer pretraining, pretraining on more text like these documents, or a wider model (v4)"
    if points < 0 and -points >= CERTAIN * error:
        return f"pretraining hurts: {found}. {advice}"
    return f"unclear: {found}, less than {CERTAIN} standard errors. {advice}"


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean. values: [N]"""
    return float(np.std(values) / np.sqrt(len(values)))


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


def _describe_training(
    encoder: MaskedLanguageModel, settings: Settings, train: LabelledRows, device: torch.device
) -> str:
    """Return what is trained on what, and, before anything is trained, how many tokens that reads."""
    shape, lengths = encoder.config, train.lengths
    in_bf16 = ", in bf16" if matmul_dtype(shape.n_embed, device) == torch.bfloat16 else ""
    n_full, n_epochs = int((lengths == shape.max_seq_len).sum()), most_epochs(settings, len(train))
    for_training = passes_of_a_step(settings) * n_epochs * int(lengths.sum())
    for_choice = most_tokens(train, settings)
    is_open = {"the learning rate": settings.learning_rate is None, "the number of epochs": settings.epochs is None}
    chosen = " and ".join(name for name, one_is_open in is_open.items() if one_is_open)
    scale = f"{WIDTH}/{shape.n_embed} x the learning rate"
    adversarial = " and an adversarial change of the embeddings" if settings.adversarial else ""
    return (
        f"{TRAINABLE[settings.trainable]}, on the first {shape.max_seq_len} tokens of each text "
        f"({n_full / len(train):.0%} are that long), with {scale}{adversarial}{in_bf16}; reads at most "
        f"{for_training:,} tokens"
        + (f", and {for_choice:,} to choose {chosen}" if for_choice else "")
        + (", and as many from random weights" if settings.baselines else "")
    )


def baseline_answers(train: LabelledTexts, test: LabelledTexts) -> dict[str, np.ndarray]:
    """Return which texts the baselines that need no neural network get right, by name: bool [N]."""
    of_words = tf_idf_answers(train, test)
    found = {} if of_words is None else {"tf-idf and logistic regression": of_words}
    return found | {"the most frequent label": test.labels == np.bincount(train.labels).argmax()}


def tf_idf_answers(train: LabelledTexts, test: LabelledTexts) -> np.ndarray | None:
    """Return which texts logistic regression on tf-idf of words and word pairs gets right: bool [N].

    It reads whole documents. Returns None if scikit-learn is not installed, or if no word occurs in two documents.
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
        return np.asarray(model.fit(train.texts, train.labels).predict(test.texts) == test.labels)
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


@plain_device_errors("use a smaller batch_size or max_seq_len")
def main() -> None:
    finetune(*_read_flags())


if __name__ == "__main__":
    main()
