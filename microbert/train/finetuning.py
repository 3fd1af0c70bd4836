"""Fine-tune a pretrained encoder as a text classifier: its constants, the training, and which texts it gets right.

Shapes: N texts, B of a batch, T tokens of the longest text, at most max_seq_len.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from microbert.config.checks import check_training_constants, require, require_at_least
from microbert.data.tokenizer import PAD_ID
from microbert.errors import Diverged
from microbert.model.classifier import WIDTH, TextClassifier, batch_of
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.counter_rng import random_bits
from microbert.runtime.device import NARROWEST_IN_BF16, autocast, fastest_dtype
from microbert.runtime.metrics import progress_bar
from microbert.train.adversarial import EmbeddingChange
from microbert.train.optim import ADAMW, NO_DECAY, parameter_groups

MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 20  # of the learning rate, which is constant from then on
AVERAGED_STEPS = 25  # the fewest over which weights are averaged: with few texts an epoch is one or two steps
FEW_TEXTS = 5_000  # below: adversarial training, and folds instead of one part held apart
ADVERSARIAL = 0.01
SORTED_BATCHES = 16  # batches whose texts are sorted by length together
TRAINABLE = {
    "all": "trains the whole model",
    "last_2": "trains the last two layers and the classifier",
    "classifier": "trains only what follows the layers",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The constants of fine-tuning. Each is a flag of `python -m microbert.finetune`, its comment the help text."""

    dataset: str = "imdb"  # "imdb" (bundled), csv, jsonl or parquet files, or a Hub id "org/name:config"
    text_column: str | None = None  # column of texts; None uses "text", or the only column of text
    label_column: str | None = None  # column of labels; None uses "label" or a similar name
    max_samples: int | None = None  # number of documents, drawn by the seed; None uses all
    shrink: float = 1.0  # factor on the pretrained matrices of the trained layers; 0.4 suits runs of weight_decay 0.01
    max_seq_len: int | None = None  # tokens read of each text; None reads up to 512 (v4), or the run's (v1 to v3)
    trainable: str = "all"  # "all", "last_2" (two layers, classifier) or "classifier" (with BERT's pooler or v4's head)
    epochs: int | None = None  # passes over the training documents; None chooses on training documents held apart
    batch_size: int = 32  # documents per step
    learning_rate: float | None = None  # for a 768-wide BERT, scaled up for narrower models; None chooses as for epochs
    weight_decay: float = 0.01  # of the weight matrices
    adversarial: float | None = None  # change of embeddings, twice the time; None: 0.01 for "all" below 5,000 texts
    seed: int = 42  # of the classifier's initial weights and the order of the documents
    device: str = "auto"  # "cpu", "cuda", "cuda:1", "mps"; "auto" uses the best one available
    baselines: bool = True  # compare with the same model from random weights, tf-idf and the most frequent label
    output_dir: str | None = None  # None uses the run's folder followed by "-finetuned"
    overwrite: bool = False  # True replaces an earlier classifier in output_dir

    def __post_init__(self) -> None:
        check_training_constants(self)
        require_at_least(1, ("epochs", "batch_size"), self)
        require_at_least(4, ("max_samples",), self)
        require(self.trainable in TRAINABLE, "trainable", f"must be one of {', '.join(TRAINABLE)}", self)
        require(0 < self.shrink <= 1, "shrink", "must be above 0 and at most 1", self)
        require(0 <= (self.adversarial or 0) < 1, "adversarial", "must be at least 0 and below 1", self)


def with_adversarial(settings: Settings, n_texts: int) -> Settings:
    """Return the settings for this many training texts, with a size of the adversarial change.

    It is 0 for many texts, where it is not known to help, and where twice the time is hours on a CPU. It is 0 with
    frozen layers, because the gradient would have to pass through all of them to the embeddings.
    """
    if settings.adversarial is not None:
        return settings
    is_used = n_texts < FEW_TEXTS and settings.trainable == "all"
    return dataclasses.replace(settings, adversarial=ADVERSARIAL if is_used else 0.0)


def passes_of_a_step(settings: Settings) -> int:
    """Return how often a step reads its texts: twice with the adversarial change."""
    return 2 if settings.adversarial else 1


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """Encoded texts with labels. rows: int32 [N, T], padded with [PAD]. labels: int64 [N]."""

    rows: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: np.ndarray) -> "LabelledRows":
        """Return the chosen texts. chosen: bool [N], or indices."""
        return LabelledRows(self.rows[chosen], self.labels[chosen])

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each text: int64 [N]."""
        return (self.rows != PAD_ID).sum(axis=1)


def scaled_learning_rate(learning_rate: float, n_embed: int) -> float:
    """Return the peak learning rate: a narrower model takes larger steps (width transfer, arXiv:2203.03466)."""
    return learning_rate * WIDTH / n_embed


def matmul_dtype(n_embed: int, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products in training; fp32 for narrow models on every device, as in v1 to v3."""
    return fastest_dtype(n_embed, device) if n_embed >= NARROWEST_IN_BF16 else torch.float32


def new_classifier(
    encoder: MaskedLanguageModel, n_classes: int, settings: Settings, is_pretrained: bool
) -> TextClassifier:
    """Return the model before its first step: freeze what is not trained, scale down pretrained trained layers."""
    model = TextClassifier(encoder, n_classes, settings.seed)
    model.choose_trainable(settings.trainable)
    if is_pretrained:
        model.shrink(settings.shrink)
    return model


class Training:
    """The training of a classifier on labelled texts, one epoch at a time.

    The learning rate is constant after a warm-up. `averaged` gives the model with the mean of its recent weights, which
    is about as good as a decayed rate at every epoch (Haegele et al. 2024, arXiv:2405.18392), so a single training
    measures every number of epochs.
    """

    def __init__(self, model: TextClassifier, texts: LabelledRows, settings: Settings, learning_rate: float) -> None:
        """learning_rate: for a 768-wide BERT. `tokens_read` counts those of both passes of an adversarial step."""
        self.model, self._texts, self._settings = model, texts, settings
        self._device = model.classifier.weight.device
        self._peak = scaled_learning_rate(learning_rate, model.encoder.config.n_embed)
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._means = [weight.detach().clone() for weight in self._weights]
        self._optimizer = _new_optimizer(model, settings.weight_decay, self._peak)
        self._change = EmbeddingChange(model.encoder.embeddings, settings.adversarial) if settings.adversarial else None
        self._lengths, self._rng = texts.lengths, np.random.default_rng(settings.seed)
        self.step, self.tokens_read = 0, 0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self._texts) / self._settings.batch_size)

    def epoch(self) -> Iterator[None]:
        """Train on each text once, and yield after each step. Raises Diverged when loss or gradient are not finite."""
        self.model.train()
        for chosen in batches_by_length(self._lengths, self._settings.batch_size, self._rng):
            self._take_step(self._texts.take(chosen))
            self.tokens_read += passes_of_a_step(self._settings) * int(self._lengths[chosen].sum())
            yield
        self.model.eval()

    def _take_step(self, batch: LabelledRows) -> None:
        keys = random_bits(self._settings.seed, self.step, np.arange(len(batch))).astype(np.int64)
        arguments = batch_of(batch.rows, self._device), torch.from_numpy(keys).to(self._device)
        labels = torch.from_numpy(batch.labels).to(self._device)
        self._optimizer.zero_grad()
        loss = self._add_gradient(arguments, labels)
        if self._change is not None:
            with self._change.against():
                self._add_gradient(arguments, labels)
        norm = nn.utils.clip_grad_norm_(self._weights, MAX_GRAD_NORM)
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise Diverged(
                f"step {self.step}: the loss is {loss:g} and the gradient norm {norm.item():g}; "
                "use a lower learning_rate"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak * min(1.0, (self.step + 1) / (WARMUP_STEPS + 1))
        self._optimizer.step()
        self.step += 1
        self._average()

    def _add_gradient(self, arguments: tuple[Tensor, Tensor], labels: Tensor) -> float:
        """Add the gradient of a batch's mean loss to those of the weights, and return the loss."""
        with autocast(matmul_dtype(self.model.encoder.config.n_embed, self._device), self._device):
            logits = self.model(*arguments)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def _average(self) -> None:
        """Move the means towards the weights: exponentially, over about an epoch, but at least AVERAGED_STEPS.

        The first steps are averaged with weights that grow linearly, because the window is longer than they are.
        """
        share = max(1 / max(self.steps_per_epoch, AVERAGED_STEPS), 2 / (self.step + 2))
        for mean, weight in zip(self._means, self._weights, strict=True):
            mean.lerp_(weight, share)

    @torch.no_grad()
    def keep_average(self) -> None:
        """End the training with the means of the weights."""
        if self._change is not None:
            self._change.remove()
        for mean, weight in zip(self._means, self._weights, strict=True):
            weight.copy_(mean)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[TextClassifier]:
        """Give the model the means of its weights, for the body of a with statement."""
        self._exchange()
        try:
            yield self.model
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for mean, weight in zip(self._means, self._weights, strict=True):
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)


def train_classifier(model: TextClassifier, texts: LabelledRows, settings: Settings, description: str) -> int:
    """Train the parameters that are not frozen, and leave the model with the means of its weights.

    settings: with epochs and learning_rate. description: title of the progress bar. Returns the number of tokens read.
    Raises Diverged when the loss or the gradient is not finite.
    """
    epochs, learning_rate = settings.epochs, settings.learning_rate
    assert epochs is not None and learning_rate is not None, "choose them first (choosing.py)"
    training = Training(model, texts, settings, learning_rate)
    with progress_bar(epochs * training.steps_per_epoch, 0, description, " steps", leave=False) as bar:
        for _ in range(epochs):
            for _ in training.epoch():
                bar.update()
    training.keep_average()
    return training.tokens_read


def batches_by_length(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the numbers of all texts in random batches of similar length, so that little is padded.

    lengths: int64 [N]. Texts are drawn in random order; SORTED_BATCHES batches at a time are sorted by length. The
    batches then come in random order.
    """
    order = rng.permutation(len(lengths))
    found = []
    for start in range(0, len(order), batch_size * SORTED_BATCHES):
        part = order[start : start + batch_size * SORTED_BATCHES]
        part = part[np.argsort(lengths[part], kind="stable")]
        found += [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
    return [found[number] for number in rng.permutation(len(found))]


def _new_optimizer(model: TextClassifier, weight_decay: float, learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW for the parameters that are not frozen. Biases and norms do not decay."""
    groups = parameter_groups(model, "adamw")
    trained = [[weight for weight in groups[name].values() if weight.requires_grad] for name in (ADAMW, NO_DECAY)]
    decays = (weight_decay, 0.0)
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": decay} for weights, decay in zip(trained, decays, strict=True)],
        lr=learning_rate,
        fused=True,
    )


@torch.no_grad()
def log_probabilities(model: TextClassifier, rows: np.ndarray, batch_size: int) -> Tensor:
    """Return the logarithm of each label's probability: float32 [N, C], on the CPU. rows: int32 [N, T].

    Texts of similar length are computed together.
    """
    model.eval()
    order = np.argsort((rows != PAD_ID).sum(axis=1), kind="stable")
    found = torch.empty(len(rows), model.classifier.out_features)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        logits = model(batch_of(rows[chosen], model.classifier.weight.device))
        found[torch.from_numpy(chosen)] = logits.float().log_softmax(dim=1).cpu()
    return found


def right_answers(model: TextClassifier, texts: LabelledRows, batch_size: int) -> np.ndarray:
    """Return whether each text's label is the likeliest one: bool [N]."""
    return log_probabilities(model, texts.rows, batch_size).argmax(dim=1).numpy() == texts.labels
