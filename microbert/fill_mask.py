"""Fill each [MASK] of a text: `python -m microbert.fill_mask runs/v1 "this movie is [MASK] ."`"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from microbert.config.flags import Parser
from microbert.data.tokenizer import MASK_ID, load_tokenizer, token_names
from microbert.errors import InputError, one_line
from microbert.model.examples import N_GUESSES, likeliest, probabilities_at
from microbert.model.hugging_face import model_from_hugging_face, read_hugging_face_config
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.files import read_json, system_trouble
from microbert.runtime.outcome import plain_errors


def fill_mask(
    model: MaskedLanguageModel, tokenizer: Tokenizer, text: str, n_best: int = N_GUESSES
) -> list[list[tuple[str, float]]]:
    """Return the likeliest ordinary tokens and their probabilities for each [MASK] of the text.

    Raises InputError if the text has no [MASK] or is longer than the model allows.
    """
    ids = encode(tokenizer, text)
    positions = [position for position, token_id in enumerate(ids) if token_id == MASK_ID]
    if not positions:
        raise InputError(f"no [MASK] in {text!r}: write [MASK], in capitals, for the missing word")
    if len(ids) > model.config.max_seq_len:
        raise InputError(f"the text has {len(ids)} tokens; this model reads at most {model.config.max_seq_len}")
    names = token_names(tokenizer)
    return [likeliest(probabilities, names, n_best) for probabilities in probabilities_at(model, ids, positions)]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text from the command line, with [CLS] and [SEP]. Raises InputError if it is not UTF-8."""
    try:
        return tokenizer.encode(text).ids
    except TypeError:
        raise InputError(f"the text {text!r} is not UTF-8") from None


def print_fill_mask(model: MaskedLanguageModel, tokenizer: Tokenizer, text: str) -> None:
    """Print the text and a line of candidates for each [MASK]."""
    print(text)
    for candidates in fill_mask(model, tokenizer, text):
        print("   " + "  ".join(f"{token} {probability:.1%}" for token, probability in candidates))


def load_run(folder: Path) -> tuple[MaskedLanguageModel, Tokenizer]:
    """Return the model and tokenizer of a run folder or a checkpoint. Raises InputError if it holds none."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model yet: pass the folder of a finished run, or a checkpoint in it")
    try:
        open(folder / "model.safetensors", "rb").close()  # load_file reports too many open files as a missing file
        config = read_hugging_face_config(read_json(folder / "config.json"))
        model = model_from_hugging_face(config, load_file(folder / "model.safetensors"))
    except KeyError as error:
        raise InputError(f"{folder} cannot be loaded: {one_line(error)} is missing") from error
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        if system_trouble(error):
            raise
        raise InputError(f"{folder} cannot be loaded: {one_line(error)}") from error
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise InputError(
            f"{folder} cannot be loaded: its tokenizer has {tokenizer.get_vocab_size():,} tokens, but its "
            f"model has {config.vocab_size:,}"
        )
    return model, tokenizer


@plain_errors()
def main() -> None:
    parser = Parser(prog="python -m microbert.fill_mask", description="Fill each [MASK] of a text.")
    parser.add_argument("folder", type=Path, help="folder of a finished run, such as runs/v1, or of a checkpoint")
    parser.add_argument("text", nargs="+", help='text with [MASK], such as "this movie is [MASK] ."')
    arguments = parser.parse_args()
    model, tokenizer = load_run(arguments.folder)
    for text in arguments.text:
        print_fill_mask(model, tokenizer, text)


if __name__ == "__main__":
    main()
