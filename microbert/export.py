"""Model -> Hugging Face folder and model card; the reload check.

The folder is written without transformers, in the layout that `save_pretrained` gives, so that a checkpoint costs
milliseconds; the check at the end of a run reads it back through transformers itself.
"""

import time
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn

from .batches import evaluation_batches
from .files import write_atomic, write_json, write_text
from .hugging_face import hugging_face_config, to_hugging_face
from .layers import MaskedLanguageModel, ModelConfig
from .masking import IGNORED, MaskedBatch, mask_batch
from .run import HELD_OUT, Run
from .tokenizer import PAD_ID, save_tokenizer
from .tokens import Tokens

MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RELOAD_TOLERANCE = 1e-4  # of the logits, in fp32
RELOAD_SEQUENCES = 8  # transformers computes the logits of every token of them: 0.2 GB for v4


def save_model(model: MaskedLanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files from which `AutoModelForMaskedLM` and `AutoTokenizer` load."""
    write_model_files(to_hugging_face(model), hugging_face_config(model.config), tokenizer, folder)


def write_model_files(weights: dict[str, Tensor], config: dict, tokenizer: Tokenizer, folder: Path) -> None:
    """Write MODEL_FILES and the vocabulary. weights, config: under the names of transformers."""
    stored = save(weights, metadata={"format": "pt"})
    write_atomic(folder / "model.safetensors", lambda file: file.write(stored))
    write_json(folder / "config.json", config)
    save_tokenizer(tokenizer, folder, config["max_position_embeddings"])


def reload(folder: Path, auto_class: str) -> nn.Module:
    """The folder's model by that class of transformers, on the CPU. Raises RuntimeError where a weight is missing or unexpected."""
    import transformers  # only here, because it takes seconds to load

    transformers.utils.logging.disable_progress_bar()
    loaded, report = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True)
    problems = {kind: names for kind, names in report.items() if names}
    if problems:
        raise RuntimeError(f"transformers does not load {folder} as it was written: {problems}")
    return loaded.eval()


def load_libraries(config: ModelConfig) -> float:
    """Import what the end of a run needs, so that it takes no time there. Returns the seconds it took."""
    start = time.perf_counter()
    import matplotlib.figure  # noqa: F401
    import transformers

    for name in ("AutoModelForMaskedLM", *hugging_face_config(config)["architectures"]):
        getattr(transformers, name)  # which imports its module
    return time.perf_counter() - start


@torch.no_grad()
def check_reload(model: MaskedLanguageModel, batch: MaskedBatch, folder: Path) -> float:
    """Loads the folder through transformers and compares its logits at the masked positions with the model's, on the CPU.

    Returns the largest absolute difference. Raises RuntimeError when a weight is missing or unexpected, or the difference is
    above RELOAD_TOLERANCE.
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


def export_run(run: Run, model: MaskedLanguageModel, tokenizer: Tokenizer, tokens: Tokens, facts: dict[str, str]) -> None:
    """Makes the run's folder a Hugging Face model, and proves it. The model card comes last: it marks the run as finished."""
    save_model(model, tokenizer, run.folder)
    batch = next(evaluation_batches(tokens.held_out, RELOAD_SEQUENCES))
    masked = mask_batch(batch, seed=run.config.seed, probability=run.config.mlm_probability, vocab_size=model.config.vocab_size)
    difference = check_reload(model, masked, run.folder)
    if tokens.held_out_below is not None:
        write_json(run.folder / HELD_OUT, {"seed": run.config.seed, "below": tokens.held_out_below})
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
