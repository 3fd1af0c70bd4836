"""Write a model as a Hugging Face folder, and check that transformers loads it.

The folder is written without transformers, in the layout of `save_pretrained`, so that a checkpoint takes milliseconds.
The check at the end of a run loads it with transformers.
"""

import time
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn

from microbert.data.masking import IGNORED, MaskedBatch
from microbert.data.tokenizer import PAD_ID, save_tokenizer
from microbert.model.hugging_face import hugging_face_config, to_hugging_face
from microbert.model.layers import MaskedLanguageModel, ModelConfig
from microbert.runtime.files import write_atomic, write_json

MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RELOAD_TOLERANCE = 1e-4  # largest difference of a logit, in fp32
CONSTANTS_FORMAT = 1  # version of constants.json


def save_model(model: MaskedLanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `AutoModelForMaskedLM` and `AutoTokenizer` load."""
    write_model_files(to_hugging_face(model), hugging_face_config(model.config), tokenizer, folder)


def write_model_files(weights: dict[str, Tensor], config: dict, tokenizer: Tokenizer, folder: Path) -> None:
    """Write MODEL_FILES and the vocabulary. weights, config: with the names of transformers."""
    stored = save(weights, metadata={"format": "pt"})
    write_atomic(folder / "model.safetensors", lambda file: file.write(stored))
    write_json(folder / "config.json", config)
    save_tokenizer(tokenizer, folder, config["max_position_embeddings"])


def reload(folder: Path, auto_class: str) -> nn.Module:
    """Load the folder with a class of transformers, on the CPU.

    Raises RuntimeError if a weight is missing or unexpected.
    """
    import transformers  # only here, because it takes seconds to load

    transformers.utils.logging.disable_progress_bar()
    loaded, report = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True)
    problems = {kind: names for kind, names in report.items() if names}
    if problems:
        raise RuntimeError(f"transformers cannot load {folder} as it was saved: {problems}")
    return loaded.eval()


def load_libraries(config: ModelConfig) -> float:
    """Import the libraries for the end of a run in advance. Return the seconds that this took."""
    start = time.perf_counter()
    import matplotlib.figure  # noqa: F401
    import transformers

    for name in ("AutoModelForMaskedLM", *hugging_face_config(config)["architectures"]):
        getattr(transformers, name)  # imports its module
    return time.perf_counter() - start


@torch.no_grad()
def check_reload(model: MaskedLanguageModel, batch: MaskedBatch, folder: Path) -> float:
    """Return the largest absolute difference between the logits of the model and of the folder loaded by transformers.

    Compares masked positions, on the CPU, to which the model is moved. Raises RuntimeError if a weight is missing or
    unexpected, or if the difference is above RELOAD_TOLERANCE.
    """
    loaded = reload(folder, "AutoModelForMaskedLM")
    model = model.eval().cpu()
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
