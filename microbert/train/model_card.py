"""The model card: README.md of a finished run's folder, as the Hugging Face Hub shows it."""

import re
from pathlib import Path

from microbert.config.constants import ResolvedConfig
from microbert.config.learning_rate import peak_learning_rate
from microbert.data.row_lengths import describe_step, row_lengths
from microbert.data.shards import Tokens
from microbert.data.training_rows import training_rows
from microbert.model.examples import Example
from microbert.runtime.files import write_text
from microbert.train.checkpoint import State


def model_card_facts(config: ResolvedConfig, tokens: Tokens, state: State) -> dict[str, str]:
    """Return the rows of the model card's table for a finished run."""
    epochs = training_rows(tokens, config).seen(state.step).epochs
    lengths = row_lengths(config)
    trained_on = f"{len(tokens.train):,} sequences of {config.max_seq_len} tokens"
    if config.rows == "documents":
        trained_on = f"documents in {len(tokens.train):,} rows of {lengths[0]} to {lengths[-1]} tokens"
    bits_per_byte = tokens.corpus_counts.bits_per_byte(state.last_eval_loss)
    return {
        "trained on": f"{config.dataset}, {trained_on}, {epochs:.3g} {'epoch' if epochs == 1 else 'epochs'}",
        "shape": f"{config.arch}, {config.n_layers} layers, {config.n_heads} heads, {config.n_embed}-dim, "
        f"{len(tokens.token_counts):,} tokens in the vocabulary",
        "steps": f"{state.step:,} of {describe_step(config)}, {config.optimizer}, "
        f"peak learning rate {peak_learning_rate(config):.3g}",
        "held-out MLM loss": f"{state.last_eval_loss:.4f} nats per masked token, "
        f"{bits_per_byte:.3f} bits per byte of text",
        "held-out MLM accuracy": f"{state.last_eval_accuracy:.1%}",
        "seed": str(config.seed),
    }


def write_model_card(
    folder: Path, title: str, facts: dict[str, str], examples: list[Example], by_length: str = ""
) -> None:
    """Write README.md of the folder. facts: the rows of a table of two columns. by_length: a table in Markdown."""
    rows = "\n".join(f"| {name} | {_table_cell(value)} |" for name, value in facts.items())
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

{_code_block("python", usage)}
{f"{chr(10)}## Loss by length{chr(10) * 2}{by_length}{chr(10)}" if by_length else ""}{_examples_section(examples)}""",
    )


def _examples_section(examples: list[Example]) -> str:
    if not examples:
        return ""
    lines = "\n".join(line for example in examples for line in example.lines())
    return f"""
## Examples

Spans of held-out documents, which the model was not trained on: one word is masked, followed by the original word with
its predicted probability, and the likeliest guesses. This text comes from the dataset: if that is private, delete this
section before you share the folder.

{_code_block("text", lines)}
"""


def _code_block(language: str, text: str) -> str:
    """Return a Markdown code block that shows any text unchanged: its fence is longer than any fence in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _table_cell(value: str) -> str:
    """Return a text escaped for a cell of a Markdown table."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(value.split()))
