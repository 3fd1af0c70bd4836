"""A text classifier on a run's encoder. It computes the same as `AutoModelForSequenceClassification` of transformers.

"bert" classifies [CLS] through a new pooler. "modern" classifies the mean of all tokens through the pretrained head,
because pretraining on masked words teaches its [CLS] nothing.
Shapes: N texts, B texts of a batch, T tokens, D = n_embed, C classes.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from microbert.data.fast_encode import Encoder
from microbert.data.tokenizer import CLS_ID, PAD_ID, SEP_ID
from microbert.errors import Diverged
from microbert.model.build import INIT_STD
from microbert.model.export import RELOAD_TOLERANCE, reload, write_model_files
from microbert.model.hugging_face import hugging_face_config, to_hugging_face
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.counter_rng import torch_generator
from microbert.runtime.files import read_json

STOCK_CLASSES = {"bert": "BertForSequenceClassification", "modern": "ModernBertForSequenceClassification"}
LEFT_OUT = {"bert": "cls.", "modern": "decoder."}  # weights that the stock classes lack, by prefix of their names
POOLING = {"bert": {}, "modern": {"classifier_pooling": "mean"}}
WIDTH = 768  # of the BERT that is fine-tuned at 5e-5 with new weights of INIT_STD
STREAM = 1  # of random numbers, other than that of build_model
ENCODED_TEXTS = 10_000  # texts encoded at a time, before they are cut to max_seq_len tokens


class TextClassifier(nn.Module):
    """A pretrained encoder with new layers: zero biases, and normal weights drawn from the seed.

    Their standard deviation makes products as large as 0.02 does in a 768-wide BERT. At 4 dimensions, with 0.02, logits
    start so close to 0 that training often stays there (docs/experiments.md).
    """

    def __init__(self, encoder: MaskedLanguageModel, n_classes: int, seed: int) -> None:
        super().__init__()
        D = encoder.config.n_embed
        self.encoder = encoder
        self.pooler = nn.Linear(D, D) if encoder.config.arch == "bert" else None
        self.classifier = nn.Linear(D, n_classes)
        generator = torch_generator(seed, STREAM)
        for layer in (self.classifier,) if self.pooler is None else (self.pooler, self.classifier):
            nn.init.normal_(layer.weight, 0.0, INIT_STD * (WIDTH / D) ** 0.5, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, input_ids: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """Return logits: [B, C]. input_ids: int64 [B, T], padded with [PAD]. dropout_keys: as in layers.py."""
        is_real = input_ids != PAD_ID
        attention_mask = None if is_real.all() else is_real
        if self.pooler is not None:
            at_cls = torch.zeros(len(input_ids), 1, dtype=torch.int64, device=input_ids.device)
            x = self.encoder.hidden_states(input_ids, attention_mask, at_cls, dropout_keys)[:, 0]  # [B, D]
            return self.classifier(self.pooler(x).tanh())
        head = self.encoder.head
        x = head.input_norm(self.encoder.hidden_states(input_ids, attention_mask, None, dropout_keys))  # [B, T, D]
        x = (x * is_real[:, :, None]).sum(1) / is_real.sum(1, keepdim=True)
        return self.classifier(head.after_norm(x))

    def choose_trainable(self, trainable: str) -> None:
        """Freeze all other weights. trainable: "all", "last_2" layers, or "classifier": everything after the layers."""
        self.requires_grad_(False)
        trained: list[nn.Module] = [self.classifier]
        trained += [self.encoder.head.transform, self.encoder.head.norm] if self.pooler is None else [self.pooler]
        if trainable == "all":
            trained.append(self.encoder)
        elif trainable == "last_2":
            trained += self.encoder.layers[-2:]
        for module in trained:
            module.requires_grad_(True)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Scale the matrices of the trainable layers.

        This is shrink and perturb (Ash and Adams 2020, arXiv:1910.08475) without noise. It helps after a pretraining
        with little weight decay, whose matrices are ten times as large as new ones, more than the learning rates of
        fine-tuning can change. With a decay of 0.1 it makes no difference (docs/experiments.md).
        """
        for module in self.encoder.layers.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                module.weight.mul_(factor)


def encode_texts(tokenizer: Tokenizer, texts: list[str], max_seq_len: int) -> np.ndarray:
    """Return the first tokens of each text between [CLS] and [SEP], padded with [PAD]: int32 [N, T].

    T is the length of the longest text, at most max_seq_len.
    """
    encoder, found = Encoder(tokenizer), []
    for first in range(0, len(texts), ENCODED_TEXTS):
        ids, lengths = encoder.encode(texts[first : first + ENCODED_TEXTS])
        starts, lengths = np.cumsum(lengths) - lengths, np.minimum(lengths, max_seq_len - 2)
        found += [ids[start : start + length].copy() for start, length in zip(starts, lengths, strict=True)]
    rows = np.full((len(texts), 2 + max(map(len, found), default=0)), PAD_ID, np.int32)
    for row, text_ids in zip(rows, found, strict=True):
        row[0], row[1 : len(text_ids) + 1], row[len(text_ids) + 1] = CLS_ID, text_ids, SEP_ID
    return rows


def batch_of(rows: np.ndarray, device: torch.device) -> Tensor:
    """Return rows: [B, T] as int64 on the device, cut to the longest text."""
    longest = 1 + int(np.flatnonzero((rows != PAD_ID).any(axis=0))[-1])
    return torch.from_numpy(rows[:, :longest].astype(np.int64)).to(device)


def save_classifier(model: TextClassifier, tokenizer: Tokenizer, names: list[str], folder: Path) -> None:
    """Write the folder that `AutoModelForSequenceClassification` and `AutoTokenizer` load. names: of the classes."""
    config = model.encoder.config
    weights = {
        name: weight
        for name, weight in to_hugging_face(model.encoder).items()
        if not name.startswith(LEFT_OUT[config.arch])
    }
    for ours, theirs in ((model.pooler, "bert.pooler.dense"), (model.classifier, "classifier")):
        if ours is not None:
            weights |= {f"{theirs}.weight": ours.weight.detach().cpu(), f"{theirs}.bias": ours.bias.detach().cpu()}
    write_model_files(
        weights,
        hugging_face_config(config)
        | {
            "architectures": [STOCK_CLASSES[config.arch]],
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }
        | POOLING[config.arch],
        tokenizer,
        folder,
    )


def is_classifier(folder: Path) -> bool:
    """Return whether the folder's configuration looks like one of `save_classifier`."""
    try:
        return read_json(folder / "config.json")["architectures"][0] in STOCK_CLASSES.values()
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


@torch.no_grad()
def check_classifier(model: TextClassifier, rows: np.ndarray, folder: Path) -> float:
    """Return the largest absolute difference between the logits of the model and of the folder loaded by transformers.

    Computed on the CPU, to which the model is moved. rows: [B, T]. Raises Diverged if a logit is not finite,
    RuntimeError if a weight is missing or unexpected, or if the difference is above RELOAD_TOLERANCE (times the largest
    logit, if above 1).
    """
    loaded = reload(folder, "AutoModelForSequenceClassification")
    input_ids = batch_of(rows, torch.device("cpu"))
    theirs = loaded(input_ids=input_ids, attention_mask=(input_ids != PAD_ID).long()).logits
    ours = model.eval().cpu()(input_ids)
    if not ours.isfinite().all():
        raise Diverged("the logits of the classifier are no longer finite. Try a lower learning_rate")
    difference = float((ours - theirs).abs().max())
    if not difference <= RELOAD_TOLERANCE * max(1.0, float(ours.abs().max())):
        raise RuntimeError(
            f"the reloaded classifier's logits differ by {difference:.2g}, more than {RELOAD_TOLERANCE:g}"
        )
    return difference
