"""Convert parameters and configurations between our models and transformers.

The stock classes are used unchanged: `BertForMaskedLM` and `ModernBertForMaskedLM`.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from microbert.data.tokenizer import CLS_ID, PAD_ID, SEP_ID
from microbert.errors import InputError, one_line
from microbert.model import bert, modern
from microbert.model.build import INIT_STD, ROTARY, new_model
from microbert.model.layers import ROTARY_BASE, MaskedLanguageModel, ModelConfig

# our module's name -> the name in transformers, or the names of several modules that are stacked in ours; {} is the
# number of the layer
NAMES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "bert": {
        "embeddings.word": "bert.embeddings.word_embeddings",
        "embeddings.position": "bert.embeddings.position_embeddings",
        "embeddings.token_type": "bert.embeddings.token_type_embeddings",
        "embeddings.norm": "bert.embeddings.LayerNorm",
        "layers.{}.attention.query_key_value": tuple(
            "bert.encoder.layer.{}.attention.self." + part for part in ("query", "key", "value")
        ),
        "layers.{}.attention.output": "bert.encoder.layer.{}.attention.output.dense",
        "layers.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "layers.{}.feed_forward.expand": "bert.encoder.layer.{}.intermediate.dense",
        "layers.{}.feed_forward.contract": "bert.encoder.layer.{}.output.dense",
        "layers.{}.output_norm": "bert.encoder.layer.{}.output.LayerNorm",
        "head.transform": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions",
    },
    "modern": {
        "embeddings.word": "model.embeddings.tok_embeddings",
        "embeddings.norm": "model.embeddings.norm",
        "layers.{}.attention_norm": "model.layers.{}.attn_norm",
        "layers.{}.attention.query_key_value": "model.layers.{}.attn.Wqkv",
        "layers.{}.attention.output": "model.layers.{}.attn.Wo",
        "layers.{}.feed_forward_norm": "model.layers.{}.mlp_norm",
        "layers.{}.feed_forward.expand": "model.layers.{}.mlp.Wi",
        "layers.{}.feed_forward.contract": "model.layers.{}.mlp.Wo",
        "head.input_norm": "model.final_norm",
        "head.transform": "head.dense",
        "head.norm": "head.norm",
        "head": "decoder",
    },
}

# arguments of `from_pretrained` for an untrusted folder
RUNS_NOTHING = {"local_files_only": True, "trust_remote_code": False}
LEAST_WEIGHTS = 5  # stored tensors of a layer, at least
LARGEST = 1_000_000  # of the sizes in a configuration
# equal in all our models of a shape: another value would silently change the logits
DECIDES_LOGITS = {
    "hidden_act",
    "hidden_activation",
    "intermediate_size",
    "layer_norm_eps",
    "norm_eps",
    "layer_types",
    "rope_parameters",
    "tie_word_embeddings",
    "type_vocab_size",
    "norm_bias",
    "attention_bias",
    "mlp_bias",
}


@contextlib.contextmanager
def errors_of_loading(folder: Path) -> Iterator[None]:
    """Raise a one-line InputError for any error of loading: transformers passes on the errors of its parsers."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{folder} cannot be loaded: {one_line(error)}") from error


def _hugging_face_names(arch: str, name: str) -> list[str]:
    """Return the names under which transformers stores a parameter."""
    module, kind = name.rsplit(".", 1)
    number = re.search(r"\.(\d+)\.", module)
    general = NAMES[arch][re.sub(r"\.\d+\.", ".{}.", module)]
    return [
        f"{one.format(number and number[1])}.{kind}" for one in ([general] if isinstance(general, str) else general)
    ]


def to_hugging_face(model: MaskedLanguageModel) -> dict[str, Tensor]:
    """Return the weights by their names in transformers. The tied output matrix is stored once, as embedding."""
    weights = {}
    for name, parameter in model.named_parameters():
        names = _hugging_face_names(model.config.arch, name)
        for stored_name, part in zip(names, parameter.detach().cpu().chunk(len(names)), strict=True):
            weights[stored_name] = part.contiguous()
    return weights


@torch.no_grad()
def from_hugging_face(model: MaskedLanguageModel, weights: dict[str, Tensor]) -> None:
    """Copy weights into the model. weights: as from `to_hugging_face`.

    Raises KeyError if one is missing, RuntimeError if one has another shape or is not real-valued.
    """
    for name, parameter in model.named_parameters():
        parts = [weights[stored_name] for stored_name in _hugging_face_names(model.config.arch, name)]
        if not all(part.is_floating_point() for part in parts):
            raise RuntimeError(f"{name} must hold real numbers, not {parts[0].dtype}")
        stored = torch.cat(parts)
        if stored.shape != parameter.shape:
            raise RuntimeError(f"{name} has the shape {list(stored.shape)}, not {list(parameter.shape)}")
        parameter.copy_(stored)


def model_from_hugging_face(config: ModelConfig, weights: dict[str, Tensor]) -> MaskedLanguageModel:
    """Return a new model with these weights. Raises KeyError, RuntimeError or ValueError if they do not fit.

    Sizes are compared before the model is allocated: a small file may describe a very large one.
    """
    n_numbers = sum(weight.numel() for weight in weights.values())
    if config.n_layers * LEAST_WEIGHTS > len(weights) or _numbers_in_matrices(config) > n_numbers:
        raise ValueError("config.json describes a larger model than model.safetensors holds")
    model = new_model(config)
    from_hugging_face(model, weights)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
    return model


def _numbers_in_matrices(config: ModelConfig) -> int:
    """Return the number of parameters in matrices: nearly all of them."""
    D, n_rows = config.n_embed, config.vocab_size + (0 if config.arch in ROTARY else config.max_seq_len)
    n_feed_forward = {"bert": 2, "modern": 3}[config.arch]
    return D * n_rows + config.n_layers * D * (4 * D + n_feed_forward * config.n_inner)


def hugging_face_config(config: ModelConfig) -> dict:
    """Return the fields of `transformers.BertConfig` or `ModernBertConfig`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embed,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.n_inner,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": INIT_STD,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": True,
        "dtype": "float32",
    } | {"bert": _bert_config, "modern": _modern_config}[config.arch](config)


def _bert_config(config: ModelConfig) -> dict:
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "type_vocab_size": bert.N_TOKEN_TYPES,
        "layer_norm_eps": bert.NORM_EPS,
    }


def _modern_config(config: ModelConfig) -> dict:
    """Set every field whose default in ModernBERT differs from ours: ids, rotary base, and layers with a window.

    transformers 5 reads the rotary base and the layers from `rope_parameters` and `layer_types`. Earlier versions
    silently ignore these and read `global_rope_theta`, `local_rope_theta` and `global_attn_every_n_layers`.
    """
    return {
        "architectures": ["ModernBertForMaskedLM"],
        "model_type": "modernbert",
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "layer_types": ["full_attention"] * config.n_layers,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": ROTARY_BASE}
            for kind in ("full_attention", "sliding_attention")
        },
        "global_rope_theta": ROTARY_BASE,
        "local_rope_theta": ROTARY_BASE,
        "global_attn_every_n_layers": 1,
        "norm_eps": modern.NORM_EPS,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "embedding_dropout": config.dropout,
        "attention_dropout": 0.0,
        "mlp_dropout": config.dropout,
        "bos_token_id": CLS_ID,
        "cls_token_id": CLS_ID,
        "eos_token_id": SEP_ID,
        "sep_token_id": SEP_ID,
    }


def read_hugging_face_config(stored: dict) -> ModelConfig:
    """Return the shape in a config.json: the inverse of `hugging_face_config`.

    Raises KeyError if a field is missing, ValueError if this package has no such model.
    """
    architectures = {"bert": ("bert", "hidden_dropout_prob"), "modernbert": ("modern", "mlp_dropout")}
    if stored["model_type"] not in architectures:
        raise ValueError(f"model_type is {stored['model_type']!r}; this suite has only bert and modernbert")
    arch, dropout = architectures[stored["model_type"]]
    for name in ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"):
        if type(stored[name]) is not int or not 1 <= stored[name] <= LARGEST:
            raise ValueError(f"{name} is {stored[name]!r}")
    if stored["hidden_size"] % (stored["num_attention_heads"] * (2 if arch == "modern" else 1)):
        raise ValueError(
            f"num_attention_heads = {stored['num_attention_heads']} does not divide "
            f"hidden_size = {stored['hidden_size']}" + (" into even parts" if arch == "modern" else "")
        )
    if stored["max_position_embeddings"] < 3:
        raise ValueError("max_position_embeddings must be at least 3: [CLS], one token, [SEP]")
    if type(stored[dropout]) not in (int, float) or not 0 <= stored[dropout] < 1:
        raise ValueError(f"{dropout} is {stored[dropout]!r}")
    config = ModelConfig(
        vocab_size=stored["vocab_size"],
        n_layers=stored["num_hidden_layers"],
        n_heads=stored["num_attention_heads"],
        n_embed=stored["hidden_size"],
        max_seq_len=stored["max_position_embeddings"],
        dropout=stored[dropout],
        arch=arch,
    )
    expected = hugging_face_config(config)
    for name in sorted(DECIDES_LOGITS & stored.keys() & expected.keys()):
        if stored[name] != expected[name]:
            raise ValueError(f"{name} is {stored[name]!r}; models of this suite have {expected[name]!r}")
    return config
