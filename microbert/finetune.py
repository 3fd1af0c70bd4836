"""Is my model good? `python -m microbert.finetune runs/v4` fine-tunes a run's encoder to tell classes of texts apart, and compares.

    python -m microbert.finetune runs/v4                                  the bundled reviews: which are positive?
    python -m microbert.finetune runs/v4 --dataset labels.csv --text-column review --label-column stars
    python -m microbert.finetune runs/v4 --max-seq-len 256                reads more of each text than the run did, where positions are rotary
    python -m microbert.finetune runs/v4 --trainable classifier           the encoder stays as pretraining left it

Accuracy is that on documents which neither this nor pretraining has trained on, beside that of the same model from random weights, of the most frequent
class, and of tf-idf with logistic regression where scikit-learn is installed. It leaves a folder that AutoModelForSequenceClassification loads.
Shapes: N texts, T tokens of the longest, at most max_seq_len.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import re
import shutil
import sys
import tempfile
import types
import typing
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from microbert.config.checks import DEVICES
from microbert.config.flags import Parser, whole_number
from microbert.data.corpus import HELD_OUT_SHARE, split_hash
from microbert.data.labelled import LabelledTexts, read_labelled
from microbert.data.tokenizer import VOCABULARY
from microbert.errors import Diverged, Failed, InputError
from microbert.fill_mask import load_run
from microbert.model.build import build_model, with_max_seq_len
from microbert.model.classifier import (
    WIDTH,
    TextClassifier,
    batch_of,
    check_classifier,
    encode_texts,
    is_classifier,
    save_classifier,
)
from microbert.model.export import MODEL_FILES
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.counter_rng import random_bits
from microbert.runtime.device import NARROWEST_IN_BF16, choose_device, fastest_dtype, multiplying_in, out_of_memory
from microbert.runtime.distributed import World
from microbert.runtime.files import read_json, system_trouble
from microbert.runtime.metrics import progress_bar
from microbert.runtime.run import HELD_OUT, plain_errors

WARMUP = 0.06  # share of the steps
EPOCHS, FEWEST_STEPS = (
    3,
    300,
)  # with fewer steps, few labels would be told apart by nothing that learns (Mosbach et al. 2021, arXiv:2006.04884)
LEARNS = {
    "all": "all of it learns",
    "last_2": "its last two layers and the classifier learn",
    "classifier": "what is behind its layers learns",
}
CHECKED_TEXTS = 8  # whose logits transformers is to give too


@dataclasses.dataclass(frozen=True)
class Settings:
    """The constants, each a flag."""

    dataset: str = (
        "imdb"  # "imdb" (bundled, with its labels), csv, jsonl or parquet files, or a Hub id "org/name:config"
    )
    text_column: str | None = None  # the column with the texts; None takes "text", or the only one that holds text
    label_column: str | None = None  # the column with the labels; None takes "label" or the like
    max_samples: int | None = None  # documents, drawn by the seed; None takes all
    shrink: float = 0.4  # the layers' matrices that learn start at so much of what pretraining has made them (docs/experiments.md); 1 leaves them
    max_seq_len: int | None = (
        None  # tokens of a text that it reads, and the classifier after it; None takes the run's; more need rotary positions (arch "modern")
    )
    trainable: str = "all"  # what learns: "all", "last_2" (the last two layers and the classifier), "classifier" (with BERT's pooler or the modern head)
    epochs: int | None = None  # passes over the training documents; None takes three, or as many as make 300 steps
    batch_size: int = 32  # documents a step
    learning_rate: float = 5e-5  # of a 768-wide BERT; a narrower one takes as much more as it is narrower
    weight_decay: float = 0.01  # of the weight matrices
    seed: int = 42  # of the classifier's weights and the order
    device: str = "auto"  # "cpu", "cuda", "cuda:1", "mps"; "auto" takes the best there is
    baselines: bool = True  # compares with the same model from random weights, and the rest
    output_dir: str | None = None  # None: the run's folder with "-finetuned" behind it
    overwrite: bool = False  # True replaces an earlier classifier in output_dir

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.max_seq_len is not None and self.max_seq_len < 3:
            raise InputError(f"max_seq_len = {self.max_seq_len} must be at least 3: [CLS], one token, [SEP]")
        if self.max_samples is not None and self.max_samples < 4:
            raise InputError(f"max_samples = {self.max_samples} must be at least 4")
        if self.trainable not in LEARNS:
            raise InputError(f'trainable = "{self.trainable}" must be one of {", ".join(LEARNS)}')
        if not 0 < self.shrink <= 1:
            raise InputError(f"shrink = {self.shrink} must be above 0 and at most 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate = {self.learning_rate} must be a finite number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay = {self.weight_decay} must be at least 0")
        if re.fullmatch(DEVICES, self.device) is None:
            raise InputError(f'device = "{self.device}" must be auto, cpu, cuda, cuda:1 (of that number) or mps')
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed = {self.seed} must be at least 0 and below 2**63")


def held_out(texts: LabelledTexts, folder: Path) -> np.ndarray:
    """Which texts are held out: those that the run has held out, if it ever saw them. bool [N]."""
    path = next(
        (path for path in (folder / HELD_OUT, folder.parent / HELD_OUT) if path.exists()), folder / HELD_OUT
    )  # a checkpoint's is its run's
    try:
        stored = read_json(path)
        seed, below = stored["seed"], stored["below"]
        if type(seed) is not int or type(below) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed!r}, below {below!r}")
    except FileNotFoundError:
        seed, below = 42, int(HELD_OUT_SHARE * 2**64)
        print(
            f"warning: {folder} does not tell which documents its run held out ({HELD_OUT}): a tenth is held out by the seed 42"
        )
    except (OSError, ValueError, KeyError) as error:
        if system_trouble(error):
            raise
        raise InputError(f"{path} is damaged ({error})") from error
    return np.array([split_hash(text, seed) < below for text in texts.texts])


def epochs_of(settings: Settings, n_texts: int) -> int:
    """Passes over the training texts, n_texts of them."""
    return settings.epochs or max(EPOCHS, math.ceil(FEWEST_STEPS / math.ceil(n_texts / settings.batch_size)))


def learning_rate_of(settings: Settings, n_embed: int) -> float:
    """Narrower models take larger steps, as in pretraining (width transfer for Adam, arXiv:2203.03466)."""
    return settings.learning_rate * WIDTH / n_embed


def dtype_of(n_embed: int, device: torch.device) -> torch.dtype:
    """In which matrices are multiplied in training. Narrow ones in fp32 on every device, as v1 to v3 pretrain them."""
    return fastest_dtype(n_embed, device) if n_embed >= NARROWEST_IN_BF16 else torch.float32


def new_classifier(
    encoder: MaskedLanguageModel, n_classes: int, settings: Settings, is_pretrained: bool
) -> TextClassifier:
    """As it is before the first step: what is not to learn frozen, and shrunk what a run has made of the layers that are to."""
    model = TextClassifier(encoder, n_classes, settings.seed)
    model.choose_trainable(settings.trainable)
    if is_pretrained:
        model.shrink(settings.shrink)
    return model


def train(model: TextClassifier, rows: np.ndarray, labels: np.ndarray, settings: Settings, described: str) -> None:
    """All epochs of what is not frozen. rows: int32 [N, T]. labels: int64 [N]. described: what the progress bar calls it. Raises Diverged."""
    weights, device = [weight for weight in model.parameters() if weight.requires_grad], model.classifier.weight.device
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    peak, dtype = (
        learning_rate_of(settings, model.encoder.config.n_embed),
        dtype_of(model.encoder.config.n_embed, device),
    )
    optimizer = torch.optim.AdamW(groups, lr=peak, fused=True)
    n_epochs = epochs_of(settings, len(rows))
    total = n_epochs * -(-len(rows) // settings.batch_size)
    warmup, rng, step = int(WARMUP * total), np.random.default_rng(settings.seed), 0
    model.train()
    with progress_bar(total, 0, described, " steps", leave=False) as bar:
        for _ in range(n_epochs):
            order = rng.permutation(len(rows))
            for start in range(0, len(order), settings.batch_size):
                chosen = order[start : start + settings.batch_size]
                keys = torch.from_numpy(random_bits(settings.seed, step, np.arange(len(chosen))).astype(np.int64)).to(
                    device
                )
                with multiplying_in(dtype, device):
                    logits = model(batch_of(rows[chosen], device), keys)
                loss = nn.functional.cross_entropy(logits.float(), torch.from_numpy(labels[chosen]).to(device))
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(weights, 1.0)
                if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                    raise Diverged(
                        f"step {step}: the loss is {loss.item():g} and the gradient's norm {norm.item():g}: a lower learning_rate would help"
                    )
                for group in optimizer.param_groups:
                    group["lr"] = peak * (
                        (step + 1) / (warmup + 1) if step < warmup else (total - step) / (total - warmup)
                    )
                optimizer.step()
                bar.update()
                step += 1
    model.eval()


@torch.no_grad()
def accuracy_of(model: TextClassifier, rows: np.ndarray, labels: np.ndarray, batch_size: int) -> float:
    """The share of the texts whose label gets the largest logit. rows: int32 [N, T]. labels: int64 [N]."""
    device, n_right = model.classifier.weight.device, 0
    for start in range(0, len(rows), batch_size):
        logits = model.eval()(batch_of(rows[start : start + batch_size], device))
        n_right += int((logits.argmax(dim=1).cpu().numpy() == labels[start : start + batch_size]).sum())
    return n_right / len(rows)


def tf_idf_accuracy(train: LabelledTexts, test: LabelledTexts) -> float | None:
    """Of logistic regression on tf-idf of words and pairs of them, on whole documents; None without scikit-learn, or where no word stands in two documents."""
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
    """Raises InputError where the folder is none that a classifier may be written to: only an earlier classifier is ever replaced."""
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"output_dir = {str(output)!r} cannot be made: {above} is no folder that can be written to")
    if not output.is_symlink() and (not output.exists() or output.is_dir() and not any(output.iterdir())):
        return
    if output.is_symlink() or not output.is_dir() or not _is_only_classifier(output):
        raise InputError(
            f"output_dir = {str(output)!r} holds something else than a classifier; choose a new folder, so that nothing of yours is replaced"
        )
    if not overwrite:
        raise InputError(
            f"output_dir = {str(output)!r} is there already; --overwrite replaces it, another --output-dir keeps both"
        )


def _is_only_classifier(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return MODEL_FILES <= names <= MODEL_FILES | {VOCABULARY} and is_classifier(folder)


def finetune(folder: Path, settings: Settings) -> dict[str, float]:
    """Fine-tunes, saves, compares. Returns the accuracies by name. Raises InputError for what the user can mend, else Failed."""
    output = Path(settings.output_dir or f"{folder}-finetuned")
    check_output(output, settings.overwrite)
    device, (encoder, tokenizer) = choose_device(settings.device, World({})), load_run(folder)
    encoder = with_max_seq_len(encoder, settings.max_seq_len)
    shape = encoder.config
    texts = read_labelled(
        settings.dataset, settings.text_column, settings.label_column, settings.max_samples, settings.seed
    )
    print(texts.source)
    is_held_out = held_out(texts, folder)
    train_texts, test_texts = texts.take(~is_held_out), texts.take(is_held_out)
    missing = [name for number, name in enumerate(texts.names) if number not in train_texts.labels]
    if missing or not test_texts.texts:
        which = f"none to train on has the label {', '.join(missing[:5])}" if missing else "none to judge by"
        raise InputError(
            f"{settings.dataset}: too few documents: {len(train_texts.texts):,} to train on, {len(test_texts.texts):,} held out, {which}"
        )
    more = ", ..." if len(texts.names) > 10 else ""
    print(
        f"documents: {len(train_texts.texts):,} to train on, {len(test_texts.texts):,} held out, "
        f"{len(texts.names)} labels: {', '.join(texts.names[:10])}{more}"
    )
    n_epochs = epochs_of(settings, len(train_texts.texts))
    in_bf16 = ", in bf16" if dtype_of(shape.n_embed, device) == torch.bfloat16 else ""
    print(
        f"{folder}: {LEARNS[settings.trainable]}, the first {shape.max_seq_len} tokens of each, "
        f"{n_epochs} {'epoch' if n_epochs == 1 else 'epochs'} at {learning_rate_of(settings, shape.n_embed):.3g} "
        f"({settings.learning_rate:g} x {WIDTH}/{shape.n_embed}){in_bf16}",
        flush=True,
    )
    train_rows, test_rows = (
        encode_texts(tokenizer, part.texts, shape.max_seq_len) for part in (train_texts, test_texts)
    )

    def accuracy_after_training(model: TextClassifier, described: str) -> float:
        train(model, train_rows, train_texts.labels, settings, described)
        return accuracy_of(model, test_rows, test_texts.labels, settings.batch_size)

    model = new_classifier(encoder, len(texts.names), settings, is_pretrained=True).to(device)
    found = {f"{folder}, fine-tuned": accuracy_after_training(model, "fine-tuning")}
    _save(model, tokenizer, texts.names, test_rows[:CHECKED_TEXTS], output)
    if settings.baselines:
        random = new_classifier(build_model(shape, settings.seed), len(texts.names), settings, is_pretrained=False).to(
            device
        )
        found["the same from random weights"] = accuracy_after_training(random, "from random weights")
        if (of_words := tf_idf_accuracy(train_texts, test_texts)) is not None:
            found["tf-idf and logistic regression"] = of_words
        found["the most frequent label"] = float(np.mean(test_texts.labels == np.bincount(train_texts.labels).argmax()))
    print(f"accuracy on the {len(test_rows):,} documents held out:")
    for name, accuracy in found.items():
        print(f"  {name:<40} {accuracy:.1%}")
    if settings.baselines and importlib.util.find_spec("sklearn") is None:
        print("  (pip install scikit-learn to see tf-idf with logistic regression beside them)")
    return found


def _save(
    model: TextClassifier, tokenizer: Tokenizer, names: list[str], checked_rows: np.ndarray, output: Path
) -> None:
    """Whole or not at all: beside its place, checked, then renamed."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            save_classifier(model, tokenizer, names, temporary)
            difference = check_classifier(model, checked_rows, temporary)
            temporary.chmod(0o755)  # as any folder, and not for its owner alone
            if output.exists():
                shutil.rmtree(output)
            os.rename(temporary, output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise Failed(f"{output} cannot be written: {error.strerror or error}") from error
    print(
        f"model: {output}, loads in transformers as AutoModelForSequenceClassification with the same logits (largest difference {difference:.1e})",
        flush=True,
    )


def _read_flags() -> tuple[Path, Settings]:
    comments = _comments()
    parser = Parser(prog="python -m microbert.finetune", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a finished run, such as runs/v4, or a checkpoint in it")
    for field in dataclasses.fields(Settings):
        flag, hint = "--" + field.name.replace("_", "-"), typing.get_type_hints(Settings)[field.name]
        text = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif field.name == "dataset":  # a glob that the shell has spelt out comes as many values
            parser.add_argument(flag, nargs="+", default=[field.default], help=text)
        else:
            kind = next(kind for kind in (typing.get_args(hint) or (hint,)) if kind is not types.NoneType)
            convert = (lambda value, name=field.name: whole_number(name, value)) if kind is int else kind
            parser.add_argument(
                *([flag, "--lr"] if field.name == "learning_rate" else [flag]),
                type=convert,
                default=field.default,
                metavar="VALUE",
                help=text,
            )
    values = vars(parser.parse_args())
    return values.pop("folder"), Settings(**values | {"dataset": ",".join(values["dataset"])})


def _comments() -> dict[str, str]:
    """What stands behind each constant above."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return {
        line.split(":")[0].strip(): line.split("  # ")[1]
        for line in lines
        if line.startswith("    ") and ": " in line and " = " in line and "  # " in line
    }


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
            raise Failed(f"out of memory ({reason}): a smaller batch_size or max_seq_len takes less") from error


if __name__ == "__main__":
    main()
