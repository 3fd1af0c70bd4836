"""A run's encoder with a classifier on it, in the way of transformers' class for it: what `AutoModelForSequenceClassification` computes from the same weights.

BERT looks at [CLS] alone, through a pooler that pretraining on masked words does not know. The modern one takes the mean of all tokens through the head of
pretraining, because masked words teach its [CLS] nothing.
Shapes: N texts, B of a batch, T tokens, D = n_embed, C classes.
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
from microbert.runtime.counter_rng import random_bits
from microbert.runtime.files import read_json

STOCK_CLASSES = {"bert": "BertForSequenceClassification", "modern": "ModernBertForSequenceClassification"}
LEFT_OUT = {
    "bert": "cls.",
    "modern": "decoder.",
}  # what of the pretrained model these classes do not have, by the names of transformers
POOLING = {"bert": {}, "modern": {"classifier_pooling": "mean"}}
WIDTH = 768  # of the BERT that is fine-tuned at 5e-5, with new weights of INIT_STD
STREAM = 1  # of random numbers, beside that of build_model
ENCODED_TEXTS = 10_000  # at a time: what is behind the first max_seq_len tokens of a text is forgotten again


class TextClassifier(nn.Module):
    """encoder: the pretrained model. The rest is new: normal weights by the seed, whose products are as large as those of a 768-wide BERT's 0.02; no bias.

    With 0.02 at 4 dimensions the logits start so near 0 that training often never leaves them (docs/experiments.md).
    """

    def __init__(self, encoder: MaskedLanguageModel, n_classes: int, seed: int) -> None:
        super().__init__()
        D = encoder.config.n_embed
        self.encoder = encoder
        self.pooler = nn.Linear(D, D) if encoder.config.arch == "bert" else None
        self.classifier = nn.Linear(D, n_classes)
        generator = torch.Generator().manual_seed(int(random_bits(seed, STREAM)[0] >> np.uint64(1)))
        for layer in filter(None, (self.pooler, self.classifier)):
            nn.init.normal_(layer.weight, 0.0, INIT_STD * (WIDTH / D) ** 0.5, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, input_ids: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """input_ids: int64 [B, T], [PAD] behind each text. dropout_keys: as in layers.py. Returns logits [B, C]."""
        is_real = input_ids != PAD_ID
        attention_mask = None if is_real.all() else is_real
        if self.pooler is not None:
            at_cls = torch.zeros(len(input_ids), 1, dtype=torch.int64, device=input_ids.device)
            return self.classifier(
                self.pooler(self.encoder.hidden_states(input_ids, attention_mask, at_cls, dropout_keys)[:, 0]).tanh()
            )
        head = self.encoder.head
        x = head.input_norm(self.encoder.hidden_states(input_ids, attention_mask, None, dropout_keys))  # [B, T, D]
        x = (x * is_real[:, :, None]).sum(1) / is_real.sum(1, keepdim=True)
        return self.classifier(head.after_norm(x))

    def choose_trainable(self, trainable: str) -> None:
        """Freezes what is not to learn. trainable: "all", "last_2" layers, or "classifier": what is behind the layers."""
        self.requires_grad_(False)
        trained: list[nn.Module] = list(filter(None, (self.pooler, self.classifier)))
        if self.pooler is None:
            trained += [self.encoder.head.transform, self.encoder.head.norm]
        if trainable == "all":
            trained.append(self.encoder)
        elif trainable == "last_2":
            trained += self.encoder.layers[-2:]
        for module in trained:
            module.requires_grad_(True)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Scales the matrices of those layers that learn: the shrinking of shrink and perturb (Ash and Adams 2020, arXiv:1910.08475), without its noise.

        After v4's pretraining they are ten times as large as new ones, more than the rates of fine-tuning can move. What it is worth: docs/experiments.md.
        """
        for module in self.encoder.layers.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                module.weight.mul_(factor)


def encode_texts(tokenizer: Tokenizer, texts: list[str], max_seq_len: int) -> np.ndarray:
    """The first tokens of each text between [CLS] and [SEP], and [PAD] behind them. int32 [N, T], T being the longest text's, at most max_seq_len."""
    encoder, found = Encoder(tokenizer), []
    for first in range(0, len(texts), ENCODED_TEXTS):
        ids, lengths = encoder.encode(texts[first : first + ENCODED_TEXTS])
        starts, lengths = np.cumsum(lengths) - lengths, np.minimum(lengths, max_seq_len - 2)
        found += [ids[start : start + length].copy() for start, length in zip(starts, lengths)]
    rows = np.full((len(texts), 2 + max(map(len, found), default=0)), PAD_ID, np.int32)
    for row, of_text in zip(rows, found):
        row[0], row[1 : len(of_text) + 1], row[len(of_text) + 1] = CLS_ID, of_text, SEP_ID
    return rows


def batch_of(rows: np.ndarray, device: torch.device) -> Tensor:
    """As long as the longest text of them. rows: [B, T]. Returns int64, cut to what is used."""
    longest = 1 + int(np.flatnonzero((rows != PAD_ID).any(axis=0))[-1])
    return torch.from_numpy(rows[:, :longest].astype(np.int64)).to(device)


def save_classifier(model: TextClassifier, tokenizer: Tokenizer, names: list[str], folder: Path) -> None:
    """Writes the folder from which `AutoModelForSequenceClassification` and `AutoTokenizer` load. names: of the classes."""
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
    """Whether `save_classifier` may have written its configuration."""
    try:
        return read_json(folder / "config.json")["architectures"][0] in STOCK_CLASSES.values()
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


@torch.no_grad()
def check_classifier(model: TextClassifier, rows: np.ndarray, folder: Path) -> float:
    """Loads the folder through transformers and compares its logits with the model's, on the CPU. rows: [B, T].

    Returns the largest absolute difference. Raises Diverged where a logit is no number, RuntimeError where a weight is missing or unexpected, or the
    difference is above RELOAD_TOLERANCE (of the largest logit, where that is above 1).
    """
    loaded = reload(folder, "AutoModelForSequenceClassification")
    input_ids = batch_of(rows, torch.device("cpu"))
    theirs, ours = (
        loaded(input_ids=input_ids, attention_mask=(input_ids != PAD_ID).long()).logits,
        model.eval().cpu()(input_ids),
    )
    if not ours.isfinite().all():
        raise Diverged("the classifier gives no numbers any more: a lower learning_rate would help")
    difference = float((ours - theirs).abs().max())
    if not difference <= RELOAD_TOLERANCE * max(1.0, float(ours.abs().max())):
        raise RuntimeError(
            f"the reloaded classifier's logits differ by {difference:.2g}, more than {RELOAD_TOLERANCE:g}"
        )
    return difference
