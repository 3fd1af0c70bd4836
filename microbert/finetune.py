"""Is my model good? `python -m microbert.finetune runs/v4` fine-tunes a run's encoder to tell classes of texts apart, and compares.

    python -m microbert.finetune runs/v4                                  the bundled reviews: which are positive?
    python -m microbert.finetune runs/v4 --dataset labels.csv --text-column review --label-column stars
    python -m microbert.finetune runs/v4 --trainable classifier           the encoder stays as pretraining left it

Accuracy is that on documents which neither this nor pretraining has trained on, beside that of the same model from random weights, of the most frequent
class, and of tf-idf with logistic regression where scikit-learn is installed. It leaves a folder that AutoModelForSequenceClassification loads.
Shapes: N texts, B of a batch, T tokens, at most the model's max_seq_len.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import shutil
import sys
import tempfile
import types
import typing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .config import InputError, whole_number
from .device import choose_device
from .distributed import World
from .documents import HELD_OUT_SHARE, split_hash
from .files import read_json
from .fill_mask import load_run
from .hugging_face import RUNS_NOTHING, errors_of_loading
from .labelled import LabelledTexts, read_labelled
from .report import progress_bar
from .run import HELD_OUT, plain_errors

WIDTH = 768  # of the BERT whose learning rate is given
WARMUP = 0.06  # share of the steps
TRAINABLE = ("all", "last_2", "classifier")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The constants, each a flag."""

    dataset: str = "imdb"  # "imdb" (bundled, with its labels), csv, jsonl or parquet files, or a Hub id "org/name:config"
    text_column: str | None = None  # the column with the texts; None takes "text", or the only one that holds text
    label_column: str | None = None  # the column with the labels; None takes "label" or the like
    max_samples: int | None = None  # documents, drawn by the seed; None takes all
    trainable: str = "all"  # which layers learn: "all", "last_2" (and the classifier), "classifier" alone
    epochs: int = 3  # passes over the training documents
    batch_size: int = 32  # documents a step
    learning_rate: float = 5e-5  # of a 768-wide BERT; a narrower one takes as much more as it is narrower
    weight_decay: float = 0.01  # of the weight matrices
    seed: int = 42  # of the classifier's weights and the order
    device: str = "auto"  # "cpu", "cuda", "cuda:1", "mps"; "auto" takes the best there is
    baselines: bool = True  # compares with the same model from random weights, and the rest
    output_dir: str | None = None  # None: the run's folder with "-finetuned" behind it
    overwrite: bool = False  # True removes what stands in output_dir

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.max_samples is not None and self.max_samples < 4:
            raise InputError(f"max_samples = {self.max_samples} must be at least 4")
        if self.trainable not in TRAINABLE:
            raise InputError(f'trainable = "{self.trainable}" must be one of {", ".join(TRAINABLE)}')
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate = {self.learning_rate} must be a finite number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay = {self.weight_decay} must be at least 0")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed = {self.seed} must be at least 0 and below 2**63")


def held_out(texts: LabelledTexts, folder: Path) -> np.ndarray:
    """Which texts are held out: those that the run has held out, if it ever saw them. bool [N]."""
    try:
        stored = read_json(folder / HELD_OUT)
        seed, below = stored["seed"], stored["below"]
        if type(seed) is not int or type(below) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed!r}, below {below!r}")
    except FileNotFoundError:
        seed, below = 42, int(HELD_OUT_SHARE * 2**64)
        print(f"warning: {folder} does not tell which documents its run held out ({HELD_OUT}): a tenth is held out by the seed 42")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / HELD_OUT} is damaged ({error})") from error
    return np.array([split_hash(text, seed) < below for text in texts.texts])


def learning_rate_of(settings: Settings, n_embed: int) -> float:
    """Narrower models take larger steps, as in pretraining (width transfer for Adam, arXiv:2203.03466)."""
    return settings.learning_rate * WIDTH / n_embed


def choose_trainable(model: nn.Module, trainable: str) -> None:
    """Freezes what is not to learn."""
    encoder = model.base_model
    if trainable != "all":
        encoder.requires_grad_(False)
        pooler = getattr(encoder, "pooler", None)  # BERT's, which pretraining on masked words does not train
        if pooler is not None:
            pooler.requires_grad_(True)
    if trainable == "last_2":
        layers = encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.layers
        for layer in layers[-2:]:
            layer.requires_grad_(True)


class Classifier:
    """A stock model of transformers and its tokenizer, on a device."""

    def __init__(self, model: nn.Module, tokenizer: object, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model.to(device), tokenizer, device

    def inputs(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """[B, T], the first max_seq_len tokens of each text."""
        encoded = self.tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
        return {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def train(self, texts: LabelledTexts, settings: Settings, described: str) -> None:
        """All epochs, by the settings; described: what the progress bar calls it. Raises InputError where the loss is no number any more."""
        import transformers

        choose_trainable(self.model, settings.trainable)
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [{"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": settings.weight_decay},
                  {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=learning_rate_of(settings, self.model.config.hidden_size))
        steps_an_epoch = -(-len(texts.texts) // settings.batch_size)
        total = settings.epochs * steps_an_epoch
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARMUP * total), total)
        rng = np.random.default_rng(settings.seed)
        self.model.train()
        with progress_bar(total, 0, described, " steps", leave=False) as bar:
            for _ in range(settings.epochs):
                order = rng.permutation(len(texts.texts))
                for start in range(0, len(order), settings.batch_size):
                    batch = texts.take(order[start : start + settings.batch_size])
                    labels = torch.from_numpy(batch.labels).to(self.device)
                    loss = nn.functional.cross_entropy(self.model(**self.inputs(batch.texts)).logits, labels)
                    if not math.isfinite(loss.item()):
                        raise InputError(f"the loss is {loss.item():g}: a lower learning_rate would help")
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(weights, 1.0)
                    optimizer.step()
                    schedule.step()
                    bar.update()
        self.model.eval()

    @torch.no_grad()
    def accuracy(self, texts: LabelledTexts, batch_size: int) -> float:
        """The share of the texts whose label gets the largest logit."""
        self.model.eval()
        n_right = 0
        for start in range(0, len(texts.texts), batch_size):
            logits = self.model(**self.inputs(texts.texts[start : start + batch_size])).logits
            n_right += int((logits.argmax(dim=1).cpu().numpy() == texts.labels[start : start + batch_size]).sum())
        return n_right / len(texts.texts)


def load_classifier(folder: Path, names: list[str], device: torch.device, seed: int, pretrained: bool) -> Classifier:
    """The run's encoder with a new classifier, by the seed; or all of it from random weights. Raises InputError as `load_run` does."""
    load_run(folder)  # which finds out what is wrong with it before transformers builds what config.json asks for
    import transformers  # only here, because it takes seconds to load

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it would tell that the classifier is new
    torch.manual_seed(seed)
    with errors_of_loading(folder):
        config = transformers.AutoConfig.from_pretrained(folder, **RUNS_NOTHING)
        config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
        config.problem_type = "single_label_classification"
        config.classifier_pooling = "mean"  # of ModernBERT, whose [CLS] pretraining on masked words teaches nothing; BERT's class has a pooler
        auto = transformers.AutoModelForSequenceClassification
        model = auto.from_pretrained(folder, config=config, **RUNS_NOTHING, use_safetensors=True) if pretrained else auto.from_config(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **RUNS_NOTHING)
    return Classifier(model.float(), tokenizer, device)


def tf_idf_accuracy(train: LabelledTexts, test: LabelledTexts) -> float | None:
    """Of logistic regression on tf-idf of words and pairs of them, on whole documents; None where scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000))
    return float(model.fit(train.texts, train.labels).score(test.texts, test.labels))


def finetune(folder: Path, settings: Settings) -> dict[str, float]:
    """Fine-tunes, compares, saves. Returns the accuracies by name. Raises InputError for what the user can mend."""
    output = Path(settings.output_dir or f"{folder}-finetuned")
    if output.exists() and not settings.overwrite:
        raise InputError(f"output_dir = {str(output)!r} is there already; --overwrite replaces it, another --output-dir keeps both")
    device = choose_device(settings.device, World({}))
    texts = read_labelled(settings.dataset, settings.text_column, settings.label_column, settings.max_samples, settings.seed)
    is_held_out = held_out(texts, folder)
    train, test = texts.take(~is_held_out), texts.take(is_held_out)
    if not len(test.texts) or len(np.unique(train.labels)) < len(texts.names):
        raise InputError(f"{settings.dataset}: {len(train.texts):,} documents to train on and {len(test.texts):,} held out are too few for {len(texts.names)} labels")
    print(f"{settings.dataset}: {len(train.texts):,} documents to train on, {len(test.texts):,} held out, {len(texts.names)} labels: {', '.join(texts.names[:10])}"
          + ", ..." * (len(texts.names) > 10))
    classifier = load_classifier(folder, texts.names, device, settings.seed, pretrained=True)
    print(f"{folder}: {settings.trainable.replace('_', ' ')} of it learns, {settings.epochs} epochs at {learning_rate_of(settings, classifier.model.config.hidden_size):.3g} "
          f"({settings.learning_rate:g} x {WIDTH}/{classifier.model.config.hidden_size})", flush=True)
    classifier.train(train, settings, "fine-tuning")
    found = {f"{folder}, fine-tuned": classifier.accuracy(test, settings.batch_size)}
    if settings.baselines:
        random = load_classifier(folder, texts.names, device, settings.seed, pretrained=False)
        random.train(train, settings, "from random weights")
        found["the same from random weights"] = random.accuracy(test, settings.batch_size)
        if (of_words := tf_idf_accuracy(train, test)) is not None:
            found["tf-idf and logistic regression"] = of_words
        found["the most frequent label"] = float(np.mean(test.labels == np.bincount(train.labels).argmax()))
    print(f"accuracy on the {len(test.texts):,} documents held out:")
    for name, accuracy in found.items():
        print(f"  {name:<40} {accuracy:.1%}")
    if settings.baselines and importlib.util.find_spec("sklearn") is None:
        print("  (pip install scikit-learn to see tf-idf with logistic regression beside them)")
    _save(classifier, output)
    return found


def _save(classifier: Classifier, output: Path) -> None:
    """Whole or not at all: beside its place, then renamed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        classifier.model.cpu().save_pretrained(temporary)
        classifier.tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # as any folder, and not for its owner alone
        if output.exists():
            shutil.rmtree(output)
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"model: {output}, loads in transformers as AutoModelForSequenceClassification")


def _read_flags() -> tuple[Path, Settings]:
    comments = _comments()
    parser = argparse.ArgumentParser(prog="python -m microbert.finetune", description=__doc__.splitlines()[0], allow_abbrev=False)
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
            parser.add_argument(*([flag, "--lr"] if field.name == "learning_rate" else [flag]), type=convert, default=field.default, metavar="VALUE", help=text)
    values = vars(parser.parse_args())
    return values.pop("folder"), Settings(**values | {"dataset": ",".join(values["dataset"])})


def _comments() -> dict[str, str]:
    """What stands behind each constant above."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return {line.split(":")[0].strip(): line.split("  # ")[1] for line in lines if line.startswith("    ") and ": " in line and " = " in line and "  # " in line}


def main() -> None:
    try:
        with plain_errors():
            finetune(*_read_flags())
    except KeyboardInterrupt:
        print("\nstopped; nothing was saved", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
