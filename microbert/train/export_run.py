"""The end of a run: export the model, check that transformers loads it, and show what it has learnt."""

import sys
from pathlib import Path

from tokenizers import Tokenizer

from microbert.data.batches import evaluation_batches
from microbert.data.corpus import Corpus
from microbert.data.masking import mask_batch
from microbert.data.shards import Tokens
from microbert.model.examples import Example, find_examples
from microbert.model.export import CONSTANTS_FORMAT, check_reload, save_model
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.files import write_json
from microbert.runtime.metrics import Metrics
from microbert.runtime.run import Run
from microbert.runtime.run_folder import CONSTANTS, HELD_OUT, LOSS_TABLE
from microbert.train.by_length import AT_THE_END, held_out_text, loss_by_length
from microbert.train.checkpoint import State
from microbert.train.length_table import as_json, as_metrics, table_lines, table_markdown
from microbert.train.model_card import model_card_facts, write_model_card

RELOAD_SEQUENCES = 8  # transformers computes the logits of all their tokens: 0.2 GB for v4
LOCAL_CONSTANTS = {"output_dir", "cache_dir"}  # paths of this machine, not written to a folder that may be shared


def export_run(
    run: Run, model: MaskedLanguageModel, tokenizer: Tokenizer, corpus: Corpus, tokens: Tokens, state: State
) -> None:
    """Write the finished run's Hugging Face folder, check that transformers loads it, and print examples.

    Moves the model to the CPU. The model card is written last, because it marks the run as finished.
    """
    config, folder = run.config, run.folder
    by_length = _show_loss_by_length(run, model, tokens, state)
    save_model(model, tokenizer, folder)
    batch = next(evaluation_batches(tokens.held_out, RELOAD_SEQUENCES))
    masked = mask_batch(batch, seed=config.seed, probability=config.mlm_probability, vocab_size=model.config.vocab_size)
    difference = check_reload(model, masked, folder)
    constants = {name: value for name, value in run.constants().items() if name not in LOCAL_CONSTANTS}
    write_json(folder / CONSTANTS, {"format": CONSTANTS_FORMAT, "corpus": corpus.key, "config": constants})
    if tokens.held_out_below is not None:
        write_json(folder / HELD_OUT, {"seed": config.seed, "below": tokens.held_out_below})
    try:
        examples = find_examples(model, tokenizer, tokens.held_out, tokens.token_counts, config.seed)
    except Exception as error:  # of any kind: the trained model matters more than its examples
        print(f"warning: no examples are shown ({type(error).__name__}: {error})", file=sys.stderr)
        examples = []
    write_model_card(folder, folder.name, model_card_facts(config, tokens, state), examples, by_length)
    run.is_done = True
    print(f"model: {folder}; transformers loads it and computes the same logits (largest difference {difference:.1e})")
    _print_examples(examples, folder / "README.md")


def _show_loss_by_length(run: Run, model: MaskedLanguageModel, tokens: Tokens, state: State) -> str:
    """Measure the loss by length, print it, write it to the run's folder, and return it as Markdown.

    Return "" after an error of any kind: the trained model matters more.
    """
    config, folder = run.config, run.folder
    try:
        sequences = state.micro_batch_size or config.micro_batch_size or config.batch_size
        batch_tokens = sequences * config.max_seq_len
        result = loss_by_length(model, held_out_text(tokens), AT_THE_END, config.seed, batch_tokens)
        print(*table_lines(result), sep="\n")
        write_json(folder / LOSS_TABLE, {"step": state.step} | as_json(result))
        metrics = Metrics(folder, state.step, for_tensorboard=config.report_to == "tensorboard")
        last, values = (metrics.lines or [{}])[-1], as_metrics(result)
        if not values.keys() <= last.keys():  # an export that was killed has written them
            position = {name: value for name, value in last.items() if "/" not in name}  # epoch, tokens, seconds
            metrics.write(position | {"step": state.step} | values)
        return table_markdown(result)
    except Exception as error:
        print(
            f"warning: the loss by length cannot be measured or written ({type(error).__name__}: {error})",
            file=sys.stderr,
        )
        return ""


def _print_examples(examples: list[Example], card: Path) -> None:
    if examples:
        print(
            f"examples from held-out text, also in {card} "
            "(delete them there before you share it, if the text is private):"
        )
    for example in examples:
        print(*example.lines(), sep="\n")
