"""Model -> Hugging Face folder and model card; the reload check.

The folder is written without transformers, in the layout that `save_pretrained` gives, so that a checkpoint costs
milliseconds; the check at the end of a run reads it back through transformers itself.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from .batches import evaluation_batches
from .files import write_atomic, write_json, write_text
from .masking import IGNORED, MaskedBatch, mask_batch
from .model import INIT_STD, LAYER_NORM_EPS, N_TOKEN_TYPES, Bert, ModelConfig
from .run import Run
from .tokenizer import PAD_ID, save_tokenizer
from .tokens import Tokens

RELOAD_TOLERANCE = 1e-4  # of the logits, in fp32
RELOAD_SEQUENCES = 8  # transformers computes the logits of every token of them: 0.2 GB for v4

# our parameter name (without .weight and .bias) -> that of transformers.BertForMaskedLM; {} is the layer's number
NAMES = {
    "embeddings.word": "bert.embeddings.word_embeddings",
    "embeddings.position": "bert.embeddings.position_embeddings",
    "embeddings.token_type": "bert.embeddings.token_type_embeddings",
    "embeddings.norm": "bert.embeddings.LayerNorm",
    "layers.{}.attention.output": "bert.encoder.layer.{}.attention.output.dense",
    "layers.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.expand": "bert.encoder.layer.{}.intermediate.dense",
    "layers.{}.contract": "bert.encoder.layer.{}.output.dense",
    "layers.{}.output_norm": "bert.encoder.layer.{}.output.LayerNorm",
    "head.transform": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
}
QUERY_KEY_VALUE = re.compile(r"layers\.(\d+)\.attention\.query_key_value\.(weight|bias)")


def _hugging_face_names(name: str) -> list[str]:
    """Under which names a parameter is stored; three for query, key and value, which this suite keeps in one matrix."""
    if name == "head.bias":
        return ["cls.predictions.bias"]
    if match := QUERY_KEY_VALUE.fullmatch(name):
        return [f"bert.encoder.layer.{match[1]}.attention.self.{part}.{match[2]}" for part in ("query", "key", "value")]
    module, kind = name.rsplit(".", 1)
    number = re.search(r"\.(\d+)\.", module)
    general = NAMES[re.sub(r"\.\d+\.", ".{}.", module)]
    return [f"{general.format(number[1] if number else '')}.{kind}"]


def to_hugging_face(model: Bert) -> dict[str, Tensor]:
    """The weights under the names of `transformers.BertForMaskedLM`. The tied output matrix is stored once, as embedding."""
    weights = {}
    for name, parameter in model.named_parameters():
        names = _hugging_face_names(name)
        for stored_name, part in zip(names, parameter.detach().cpu().chunk(len(names))):
            weights[stored_name] = part.contiguous()
    return weights


@torch.no_grad()
def from_hugging_face(model: Bert, weights: dict[str, Tensor]) -> None:
    """Copies weights as `to_hugging_face` gives them into the model. Raises KeyError or RuntimeError where they do not fit."""
    for name, parameter in model.named_parameters():
        stored = torch.cat([weights[stored_name] for stored_name in _hugging_face_names(name)])
        if stored.shape != parameter.shape:
            raise RuntimeError(f"{name} has the shape {list(stored.shape)}, not {list(parameter.shape)}")
        parameter.copy_(stored)


def hugging_face_config(config: ModelConfig) -> dict:
    """The fields of `transformers.BertConfig`."""
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embed,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.n_inner,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": config.max_seq_len,
        "type_vocab_size": N_TOKEN_TYPES,
        "initializer_range": INIT_STD,
        "layer_norm_eps": LAYER_NORM_EPS,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def model_config(stored: dict) -> ModelConfig:
    """The inverse of `hugging_face_config`. Raises KeyError where a field is missing."""
    return ModelConfig(vocab_size=stored["vocab_size"], n_layers=stored["num_hidden_layers"], n_heads=stored["num_attention_heads"],
                       n_embed=stored["hidden_size"], max_seq_len=stored["max_position_embeddings"], dropout=stored["hidden_dropout_prob"])


def save_model(model: Bert, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the four files from which `AutoModelForMaskedLM` and `AutoTokenizer` load."""
    weights = save(to_hugging_face(model), metadata={"format": "pt"})
    write_atomic(folder / "model.safetensors", lambda file: file.write(weights))
    write_json(folder / "config.json", hugging_face_config(model.config))
    save_tokenizer(tokenizer, folder, model.config.max_seq_len)


@torch.no_grad()
def check_reload(model: Bert, batch: MaskedBatch, folder: Path) -> float:
    """Loads the folder through transformers and compares its logits at the masked positions with the model's, on the CPU.

    Returns the largest absolute difference. Raises RuntimeError when a weight is missing or unexpected, or the difference is
    above RELOAD_TOLERANCE.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded, report = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    problems = {kind: names for kind, names in report.items() if names}
    if problems:
        raise RuntimeError(f"transformers does not load {folder} as it was written: {problems}")
    model = model.eval().cpu()
    loaded = loaded.eval()
    input_ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions)
    attention_mask = input_ids != PAD_ID
    used = torch.from_numpy(batch.labels).reshape(-1) != IGNORED
    ours = model.logits(input_ids, attention_mask, positions)[used]
    theirs = loaded(input_ids=input_ids, attention_mask=attention_mask.long()).logits  # [B, T, V]
    theirs = torch.take_along_dim(theirs, positions[:, :, None], dim=1).flatten(0, 1)[used]
    difference = float((ours - theirs).abs().max())
    if not difference <= RELOAD_TOLERANCE:
        raise RuntimeError(f"the reloaded model's logits differ by {difference:.2g}, more than {RELOAD_TOLERANCE:g}")
    return difference


def export_run(run: Run, model: Bert, tokenizer: Tokenizer, tokens: Tokens, facts: dict[str, str]) -> None:
    """Makes the run's folder a Hugging Face model, and proves it. The model card comes last: it marks the run as finished."""
    save_model(model, tokenizer, run.folder)
    batch = next(evaluation_batches(tokens.held_out, RELOAD_SEQUENCES))
    masked = mask_batch(batch, seed=run.config.seed, probability=run.config.mlm_probability, vocab_size=model.config.vocab_size)
    difference = check_reload(model, masked, run.folder)
    write_model_card(run.folder, run.folder.name, facts)
    print(f"model: {run.folder}, loads in transformers with the same logits (largest difference {difference:.1e})")


def write_model_card(folder: Path, title: str, facts: dict[str, str]) -> None:
    """README.md of the folder, in the form that the Hugging Face Hub shows. facts: a table of two columns."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    write_text(folder / "README.md", f"""---
library_name: transformers
pipeline_tag: fill-mask
tags:
- bert
- microbert
---

# {title}

A BERT encoder pretrained from scratch with masked language modelling by MicroBERT.

| | |
|---|---|
{rows}

```python
from transformers import pipeline

fill_mask = pipeline("fill-mask", model="path/to/this/folder")
print(fill_mask("this movie is [MASK] ."))
```
""")
