"""Model -> Hugging Face folder and model card; the reload check.

The folder is written without transformers, in the layout that `save_pretrained` gives, so that a checkpoint costs
milliseconds; the check at the end of a run reads it back through transformers itself.
"""

import re
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn

from microbert.data.batches import evaluation_batches
from microbert.data.corpus import Corpus
from microbert.data.masking import IGNORED, MaskedBatch, mask_batch
from microbert.data.shards import Tokens
from microbert.data.tokenizer import PAD_ID, save_tokenizer
from microbert.model.examples import Example, find_examples
from microbert.model.hugging_face import hugging_face_config, to_hugging_face
from microbert.model.layers import MaskedLanguageModel, ModelConfig
from microbert.runtime.files import write_atomic, write_json, write_text
from microbert.runtime.run import Run
from microbert.runtime.run_folder import CONSTANTS, HELD_OUT

MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RELOAD_TOLERANCE = 1e-4  # of the logits, in fp32
CONSTANTS_FORMAT = 1  # of constants.json
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


def export_run(
    run: Run, model: MaskedLanguageModel, tokenizer: Tokenizer, corpus: Corpus, tokens: Tokens, facts: dict[str, str]
) -> None:
    """Make the run's folder a Hugging Face model, check that it loads, and print a few examples.

    Moves the model to the CPU. The model card is written last, because it marks the run as finished.
    """
    save_model(model, tokenizer, run.folder)
    batch = next(evaluation_batches(tokens.held_out, RELOAD_SEQUENCES))
    masked = mask_batch(
        batch, seed=run.config.seed, probability=run.config.mlm_probability, vocab_size=model.config.vocab_size
    )
    difference = check_reload(model, masked, run.folder)
    of_this_machine = ("output_dir", "cache_dir")  # the folder may be shared
    constants = {name: value for name, value in run.constants().items() if name not in of_this_machine}
    write_json(run.folder / CONSTANTS, {"format": CONSTANTS_FORMAT, "corpus": corpus.key, "config": constants})
    if tokens.held_out_below is not None:
        write_json(run.folder / HELD_OUT, {"seed": run.config.seed, "below": tokens.held_out_below})
    try:
        examples = find_examples(model, tokenizer, tokens, run.config.seed)
    except Exception as error:  # of whatever kind: a trained model matters more than its examples
        print(f"warning: no examples are shown ({type(error).__name__}: {error})", file=sys.stderr)
        examples = []
    write_model_card(run.folder, run.folder.name, facts, examples)
    run.is_done = True
    print(f"model: {run.folder}, loads in transformers with the same logits (largest difference {difference:.1e})")
    _print_examples(examples, run.folder)


def _print_examples(examples: list[Example], folder: Path) -> None:
    if examples:
        card = folder / "README.md"
        print(
            f"examples from held-out text, also in {card} "
            "(delete them there before you share it, if the text is private):"
        )
        for line in (line for example in examples for line in example.lines()):
            print(line)


def write_model_card(folder: Path, title: str, facts: dict[str, str], examples: list[Example]) -> None:
    """README.md of the folder, in the form that the Hugging Face Hub shows. facts: a table of two columns."""
    rows = "\n".join(f"| {name} | {_in_a_cell(value)} |" for name, value in facts.items())
    text = examples[0].text if examples else "... [MASK] ..."
    usage = f"""from transformers import pipeline

fill_mask = pipeline("fill-mask", model="path/to/this/folder")
print(fill_mask({text!r}))"""
    write_text(
        folder / "README.md",
        f"""---
library_name: transformers
pipeline_tag: fill-mask
tags:
- bert
- microbert
---

# {" ".join(title.split())}

A BERT encoder pretrained from scratch with masked language modelling by MicroBERT.

| | |
|---|---|
{rows}

{_block("python", usage)}
{_examples_section(examples)}""",
    )


def _examples_section(examples: list[Example]) -> str:
    if not examples:
        return ""
    shown = "\n".join(line for example in examples for line in example.lines())
    return f"""
## Examples

Spans of held-out documents, which were not trained on: one word masked, the word that was there with the probability
that the model gives it, and the likeliest guesses. This is text of the data set: if that is private, delete this
section before you share the folder.

{_block("text", shown)}
"""


def _block(language: str, text: str) -> str:
    """A Markdown code block, which shows any text as it is: its fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _in_a_cell(value: str) -> str:
    """A text in a cell of a Markdown table."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(value.split()))
