"""Fine-tune a pretrained encoder as a text classifier: its constants, the training loop and its accuracy.

Shapes: N texts, B of a batch, T tokens of the longest text, at most max_seq_len.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from microbert.config.checks import check_training_constants, require, require_at_least
from microbert.errors import Diverged
from microbert.model.classifier import WIDTH, TextClassifier, batch_of
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.counter_rng import random_bits
from microbert.runtime.device import NARROWEST_IN_BF16, autocast, fastest_dtype
from microbert.runtime.metrics import progress_bar
from microbert.train.optim import ADAMW, NO_DECAY, parameter_groups
from microbert.train.schedule import learning_rate_share

EPOCHS = 3
MIN_STEPS = 300  # fewer steps are too few to learn from a small set (Mosbach et al. 2021, arXiv:2006.04884)
MAX_GRAD_NORM = 1.0
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
    shrink: float = 0.4  # factor on the pretrained matrices of the trained layers (docs/experiments.md); 1 keeps them
    max_seq_len: int | None = None  # tokens read of each text; None uses the run's; more need rotary positions (v4)
    trainable: str = "all"  # "all", "last_2" (two layers, classifier) or "classifier" (with BERT's pooler or v4's head)
    epochs: int | None = None  # passes over the training documents; None means 3, or as many as make 300 steps
    batch_size: int = 32  # documents per step
    learning_rate: float = 5e-5  # for a 768-wide BERT; scaled up for narrower models
    weight_decay: float = 0.01  # of the weight matrices
    seed: int = 42  # of the classifier's initial weights and the order of the documents
    device: str = "auto"  # "cpu", "cuda", "cuda:1", "mps"; "auto" uses the best one available
    baselines: bool = True  # compare with the same model from random weights, tf-idf and the most frequent label
    output_dir: str | None = None  # None uses the run's folder followed by "-finetuned"
    overwrite: bool = False  # True replaces an earlier classifier in output_dir

    # what `learning_rate_share` reads: 6 % warm-up, then linear decay
    schedule: ClassVar[str] = "linear"
    warmup_ratio: ClassVar[float] = 0.06
    decay_ratio: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_training_constants(self)
        require_at_least(1, ("epochs", "batch_size"), self)
        require_at_least(4, ("max_samples",), self)
        require(self.trainable in TRAINABLE, "trainable", f"must be one of {', '.join(TRAINABLE)}", self)
        require(0 < self.shrink <= 1, "shrink", "must be above 0 and at most 1", self)


def epochs_for(settings: Settings, n_texts: int) -> int:
    """Return the number of passes over this many training texts."""
    return settings.epochs or max(EPOCHS, math.ceil(MIN_STEPS / math.ceil(n_texts / settings.batch_size)))


def scaled_learning_rate(settings: Settings, n_embed: int) -> float:
    """Return the peak learning rate: a narrower model takes larger steps (width transfer, arXiv:2203.03466)."""
    return settings.learning_rate * WIDTH / n_embed


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


def train_classifier(
    model: TextClassifier, rows: np.ndarray, labels: np.ndarray, settings: Settings, description: str
) -> None:
    """Train the parameters that are not frozen, for all epochs.

    rows: int32 [N, T]. labels: int64 [N]. description: title of the progress bar.
    Raises Diverged when the loss or the gradient is not finite.
    """
    device, n_embed = model.classifier.weight.device, model.encoder.config.n_embed
    peak, dtype = scaled_learning_rate(settings, n_embed), matmul_dtype(n_embed, device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = _new_optimizer(model, settings.weight_decay, peak)
    n_epochs = epochs_for(settings, len(rows))
    total_steps = n_epochs * math.ceil(len(rows) / settings.batch_size)
    model.train()
    with progress_bar(total_steps, 0, description, " steps", leave=False) as bar:
        for step, chosen in enumerate(_batches(len(rows), n_epochs, settings)):
            keys = random_bits(settings.seed, step, np.arange(len(chosen))).astype(np.int64)
            with autocast(dtype, device):
                logits = model(batch_of(rows[chosen], device), torch.from_numpy(keys).to(device))
            loss = nn.functional.cross_entropy(logits.float(), torch.from_numpy(labels[chosen]).to(device))
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise Diverged(
                    f"step {step}: the loss is {loss.item():g} and the gradient norm {norm.item():g}; "
                    "use a lower learning_rate"
                )
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate_share(step, total_steps, settings)
            optimizer.step()
            bar.update()
    model.eval()


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


def _batches(n_rows: int, n_epochs: int, settings: Settings) -> Iterator[np.ndarray]:
    """Yield the row numbers of each batch, [B], in a new order in each epoch."""
    rng = np.random.default_rng(settings.seed)
    for _ in range(n_epochs):
        order = rng.permutation(n_rows)
        for start in range(0, n_rows, settings.batch_size):
            yield order[start : start + settings.batch_size]


@torch.no_grad()
def accuracy(model: TextClassifier, rows: np.ndarray, labels: np.ndarray, batch_size: int) -> float:
    """Return the share of texts whose label has the largest logit. rows: int32 [N, T]. labels: int64 [N]."""
    device, n_right = model.classifier.weight.device, 0
    for start in range(0, len(rows), batch_size):
        logits = model.eval()(batch_of(rows[start : start + batch_size], device))
        n_right += int((logits.argmax(dim=1).cpu().numpy() == labels[start : start + batch_size]).sum())
    return n_right / len(rows)
