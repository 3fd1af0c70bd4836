"""How good is a model at each length? Loss by input length, weights, attention, and blanks with the true word.

    python -m microbert.evaluate runs/v4                            on the documents that the run has held out
    python -m microbert.evaluate runs/v4/checkpoint-2000            the same for a checkpoint
    python -m microbert.evaluate runs/v4 --dataset other.jsonl      on other text
    python -m microbert.evaluate runs/v4 --documents 200            sooner, and less exactly

Writes loss_by_length.png and loss_by_length.json. docs/evaluate.md explains the table. Shapes: D documents, T tokens.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from microbert.config.checks import check_seed_and_device, require_at_least
from microbert.config.flags import Parser, whole_number
from microbert.config.terminal import counted
from microbert.data.first_documents import encode_documents, read_first_documents
from microbert.data.prepare import find_tokens, prepare_quietly
from microbert.data.shards import Sequences
from microbert.data.sources import open_corpus
from microbert.data.tokenizer import CLS_ID, PAD_ID, SEP_ID, find_tokenizer
from microbert.errors import Failed, InputError
from microbert.fill_mask import load_run
from microbert.model.examples import Example, find_examples
from microbert.model.health import WeightsRms, largest_attention_logit, weights_rms
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.commands import plain_device_errors
from microbert.runtime.device import choose_device, send
from microbert.runtime.distributed import World
from microbert.runtime.files import not_writable, write_json
from microbert.runtime.metrics import progress_bar
from microbert.runtime.run_folder import LOSS_TABLE
from microbert.train.by_length import (
    BATCH_TOKENS,
    HeldOutText,
    LossByLength,
    choose_documents,
    held_out_text,
    loss_by_length,
    masked_rows,
    readable_lengths,
    thorough,
)
from microbert.train.health_check import LARGE_LOGIT, largest_healthy_rms
from microbert.train.length_table import LEGEND, as_json, draw_losses, table_lines
from microbert.train.recorded import Record, read_record

BLANKS, BLANK_TOKENS = 5, 128  # blanks to show, and tokens read of each document to find them
LOGIT_DOCUMENTS = 64
GPU_BATCH_TOKENS = 65_536
RESTORE_OR_OTHER = "Restore it, or evaluate on text that the model was not trained on, with --dataset"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the command finds. attention_logit: None if no document is long enough."""

    losses: LossByLength
    weights: WeightsRms
    attention_logit: float | None
    blanks: list[Example]


def evaluate(
    model: MaskedLanguageModel, tokenizer: Tokenizer, text: HeldOutText, n_documents: int, seed: int
) -> Evaluation:
    """Measure the model, which is on any device, on the text. n_documents: at each length, at most."""
    is_on_gpu = model.output_bias.device.type != "cpu"
    batch_tokens = GPU_BATCH_TOKENS if is_on_gpu else BATCH_TOKENS
    with progress_bar(len(readable_lengths(model)), 0, "evaluating", " lengths", leave=False) as bar:
        losses = loss_by_length(model, text, thorough(n_documents), seed, batch_tokens, lambda length: bar.update())
    return Evaluation(
        losses,
        weights_rms(model),
        _attention_logit(model, text, losses, seed),
        find_examples(model, tokenizer, _as_sequences(text.documents), text.token_counts, seed, BLANKS),
    )


def _attention_logit(model: MaskedLanguageModel, text: HeldOutText, losses: LossByLength, seed: int) -> float | None:
    """Return the largest attention logit on rows of the longest length that was measured."""
    if not losses.scores:
        return None
    longest = losses.scores[-1].length
    numbers = choose_documents(text.documents, longest, LOGIT_DOCUMENTS, seed)
    rows = masked_rows(text.documents, numbers, np.zeros_like(numbers), longest, seed)
    return largest_attention_logit(model, send(rows.input_ids, model.output_bias.device))


def _as_sequences(documents: np.ndarray) -> Sequences:
    """Return the beginnings of documents as sequences of BLANK_TOKENS tokens, with [CLS] and [SEP]."""
    ids = documents[:, : BLANK_TOKENS - 2]
    rows = np.full((len(ids), BLANK_TOKENS), PAD_ID, documents.dtype)
    rows[:, 0], rows[:, 1:-1] = CLS_ID, ids
    rows[np.arange(len(ids)), 1 + (ids != PAD_ID).sum(axis=1)] = SEP_ID
    return Sequences(rows)


def own_text(folder: Path, record: Record, tokenizer: Tokenizer, cache_dir: str, **changed: object) -> HeldOutText:
    """Return the documents that a run has held out, from its cache, or prepared again. Print which.

    changed: constants that differ from the run's, such as a dataset that was moved. Raises InputError if the text or
    the tokenizer is not the run's.
    """
    try:
        config = record.config(cache_dir, **changed)
        corpus = open_corpus(config)
    except InputError as error:
        raise InputError(f"the text of {folder} cannot be read: {error}. {RESTORE_OR_OTHER}") from error
    if record.corpus_key not in (None, corpus.key):
        raise InputError(
            f"{folder} was trained on other text than dataset = {config.dataset!r} is now. {RESTORE_OR_OTHER}"
        )
    cached = find_tokenizer(corpus, config)
    _check_tokenizer(folder, tokenizer, cached, cache_dir)
    if cached is None or find_tokens(corpus, cached, config) is None:
        print(f"the tokens of {corpus.description} are not in {cache_dir}: preparing them again ...", flush=True)
    _, prepared, tokens = prepare_quietly(config)
    _check_tokenizer(folder, tokenizer, prepared, cache_dir)
    if record.tokens_key not in (None, tokens.key):
        raise InputError(
            f"{folder} was trained on other tokens than those of dataset = {config.dataset!r}: its text has changed, "
            f"or an earlier version of this suite prepared it. {RESTORE_OR_OTHER}"
        )
    text = held_out_text(tokens)
    print(f"text: {counted(len(text.documents), 'held-out document')} of {corpus.description}")
    return text


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, cached: Tokenizer | None, cache_dir: str) -> None:
    """Raise InputError if the cache has another tokenizer than the folder."""
    if cached is not None and cached.to_str() != tokenizer.to_str():
        raise InputError(
            f"the tokenizer of {folder} is not the one that its text has in cache_dir = {cache_dir!r}. "
            f"{RESTORE_OR_OTHER}"
        )


def _is_own(record: Record, dataset: str, cache_dir: str) -> bool:
    """Return whether the dataset is the text of the run, perhaps under another name. A checkpoint needs its cache."""
    try:
        config = record.config(cache_dir, dataset=dataset)
        corpus = open_corpus(config)
        cached = find_tokenizer(corpus, config)
        tokens = cached and find_tokens(corpus, cached, config)
    except InputError:  # such as another column, or a damaged cache
        return False
    if record.corpus_key is not None:
        return corpus.key == record.corpus_key
    return tokens is not None and tokens.key == record.tokens_key


def other_text(dataset: str, text_column: str | None, n_documents: int, tokenizer: Tokenizer) -> HeldOutText:
    """Return the first documents of other text, encoded in memory, and print which. Raises InputError."""
    description, texts = read_first_documents(dataset, text_column, n_documents)
    encoded = encode_documents(tokenizer, texts)
    print(f"text: {description}")
    nats_to_bits = encoded.tokens / encoded.bytes / float(np.log(2))
    return HeldOutText(encoded.documents, encoded.token_counts, lambda loss: loss * nats_to_bits)


def find_text(arguments: argparse.Namespace, tokenizer: Tokenizer) -> HeldOutText:
    """Return the text to evaluate on: the run's held-out documents, or that of --dataset. Raises InputError."""
    folder, record = arguments.folder, read_record(arguments.folder)
    if arguments.dataset is None:
        if record is None:
            raise InputError(
                f"{folder} does not record which text it was trained on (constants.json, or state.json of a "
                "checkpoint): pass a text that it was not trained on, with --dataset"
            )
        if arguments.text_column is not None:
            raise InputError("--text-column is for the files of --dataset; the run's own text has the run's column")
        return own_text(folder, record, tokenizer, arguments.cache_dir)
    dataset = ",".join(arguments.dataset)
    if record is not None and _is_own(record, dataset, arguments.cache_dir):
        return own_text(folder, record, tokenizer, arguments.cache_dir, dataset=dataset)
    return other_text(dataset, arguments.text_column, arguments.documents, tokenizer)


def print_evaluation(found: Evaluation, n_embed: int) -> None:
    """Print the table, the weights, the attention and the blanks."""
    print(*table_lines(found.losses), *(f"  {line}" for line in LEGEND), sep="\n")
    print(
        f"root mean square of the weights: word embeddings {found.weights.embeddings:.3f}, matrices of the layers "
        f"{found.weights.smallest:.3f} to {found.weights.largest:.3f} (healthy at this width: below "
        f"{largest_healthy_rms(n_embed):.2f})"
    )
    if found.attention_logit is not None:
        print(f"largest attention logit: {found.attention_logit:.1f} (healthy: below {LARGE_LOGIT:,.0f})")
    if found.blanks:
        print("blanks:")
    for example in found.blanks:
        print(*example.lines(), sep="\n")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate a run as the command line says. Raises InputError or Failed."""
    folder, output = arguments.folder, arguments.output_dir or arguments.folder
    model, tokenizer = load_run(folder)
    if (obstacle := not_writable(output)) is not None:
        raise InputError(f"output_dir = {str(output)!r} cannot be written: {obstacle} is not a writable folder")
    device = choose_device(arguments.device, World.alone())
    text = find_text(arguments, tokenizer)
    found = evaluate(model.to(device), tokenizer, text, arguments.documents, arguments.seed)
    print_evaluation(found, model.config.n_embed)
    facts = {
        "run": str(folder),
        "dataset": arguments.dataset,
        "documents": len(text.documents),
        "seed": arguments.seed,
        **as_json(found.losses),
        "weights_rms": dataclasses.asdict(found.weights),
        "attention_logit": found.attention_logit,
        "blanks": [dataclasses.asdict(example) for example in found.blanks],
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / LOSS_TABLE, facts)
        picture = draw_losses(output, folder, found.losses)
    except OSError as error:
        raise Failed(f"{output} cannot be written: {error.strerror or error}") from error
    print(output / LOSS_TABLE, picture, sep="\n")


def _read_flags() -> argparse.Namespace:
    parser = Parser(prog="python -m microbert.evaluate", description="Show how good a model is at each input length.")
    parser.add_argument("folder", type=Path, help="a finished run, such as runs/v4, or one of its checkpoints")
    parser.add_argument("--dataset", nargs="+", help="imdb, or files to evaluate on; default: the run's held-out text")
    parser.add_argument("--text-column", help="column of the files; default: text, or the only column with text")
    parser.add_argument("--cache-dir", default="cache", help="folder of the run's prepared tokens (default: cache)")
    parser.add_argument("--documents", default="1000", help="documents at each length, at most (default: 1000)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto (default) uses the best one")
    parser.add_argument("--seed", default="42", help="of the masks and the choice of documents (default: 42)")
    parser.add_argument("--output-dir", type=Path, help="folder of the picture and the JSON (default: the run's)")
    arguments = parser.parse_args()
    arguments.documents = whole_number("documents", arguments.documents)
    arguments.seed = whole_number("seed", arguments.seed)
    require_at_least(1, ("documents",), arguments)
    check_seed_and_device(arguments)
    return arguments


@plain_device_errors("use --device cpu")
def main() -> None:
    run(_read_flags())


if __name__ == "__main__":
    main()
