"""Train, save and load a WordPiece tokenizer. The only place that defines the ids of the special tokens."""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from microbert.config.constants import Config
from microbert.data.corpus import HELD_OUT_SHARE, Corpus, clean, split_hash
from microbert.errors import InputError, one_line
from microbert.runtime.files import fingerprint, system_trouble, write_json, write_text
from microbert.runtime.waiting import never_stop

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID = range(len(SPECIAL_TOKENS))
N_SPECIAL = len(SPECIAL_TOKENS)  # ordinary tokens have ids >= N_SPECIAL
VOCABULARY = "vocab.txt"  # one token per line, sorted by id; transformers 4's Python BertTokenizer reads only this file

SAMPLE_CHARACTERS = 16_000_000  # training sample; more text uses more memory and hardly changes the vocabulary
PIECE_CHARACTERS = 100_000  # the library gets texts in pieces, because it uses about 50 bytes per character
LONGEST_WORD = 100  # characters; longer words are split: the library maps them to [UNK], and its search is cubic
FORMAT = 4  # increase it whenever the same corpus would produce another tokenizer


def get_tokenizer(corpus: Corpus, config: Config, check_stop: Callable[[], None] = never_stop) -> Tokenizer:
    """Load the tokenizer of this corpus and configuration from the cache, or train it and save it there.

    Raises InputError if the corpus has no text.
    """
    if tokenizer := find_tokenizer(corpus, config):
        return tokenizer
    sample = _training_sample(corpus, config.seed, check_stop)
    tokenizer = train_tokenizer(
        lambda: iter(sample),
        vocab_size=config.vocab_size,
        lowercase=config.lowercase,
        strip_accents=config.strip_accents,
    )
    write_text(tokenizer_path(corpus, config), tokenizer.to_str())
    return tokenizer


def find_tokenizer(corpus: Corpus, config: Config) -> Tokenizer | None:
    """Return the cached tokenizer of this corpus and configuration, or None if it is not trained yet."""
    path = tokenizer_path(corpus, config)
    return load_tokenizer(path) if path.exists() else None


def tokenizer_path(corpus: Corpus, config: Config) -> Path:
    """Return the path at which `get_tokenizer` caches the tokenizer."""
    key = fingerprint(FORMAT, config.vocab_size, config.lowercase, config.strip_accents, config.seed, SAMPLE_CHARACTERS)
    return corpus.cache_folder(config) / f"tokenizer-{key}.json"


def train_tokenizer(
    sample: Callable[[], Iterator[str]], *, vocab_size: int, lowercase: bool, strip_accents: bool
) -> Tokenizer:
    """Train a WordPiece tokenizer with at most `vocab_size` tokens, the special tokens first. `sample` is called twice.

    The trainer of the library numbers characters in the order of a randomly seeded hash table and breaks ties between
    merges by these numbers, so two trainings on the same text differ. Passing the most frequent characters as special
    tokens fixes their numbers and makes the result depend on the text alone.
    """
    normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, lowercase=lowercase, strip_accents=strip_accents
    )
    characters: Counter[str] = Counter()
    for text in sample():
        characters.update(normalizer.normalize_str(text))
    by_frequency = sorted((c for c in characters if not c.isspace()), key=lambda c: (-characters[c], c))
    frequent = by_frequency[: largest_alphabet(vocab_size)]
    alphabet = sorted(frequent)
    alphabet += ["##" + c for c in alphabet if _continues_a_word(c)]
    alphabet = alphabet[: vocab_size - N_SPECIAL]

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = _pre_tokenizer()
    named = [*SPECIAL_TOKENS, *alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=named, limit_alphabet=len(frequent), min_frequency=2, show_progress=False
    )
    trained.train_from_iterator(sample(), trainer)

    ids = trained.get_vocab()
    merged = sorted(ids.keys() - set(named), key=ids.__getitem__)
    vocabulary = (named + merged)[:vocab_size]
    # build a new tokenizer, because the trainer marks every named character as a special token
    tokenizer = Tokenizer(models.WordPiece(vocab={token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = _post_processor()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Split like BERT, then split words into pieces of LONGEST_WORD characters, for text without spaces."""
    cut = pre_tokenizers.Split(Regex(f".{{{LONGEST_WORD}}}"), "isolated")
    return pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), cut])


def largest_alphabet(vocab_size: int) -> int:
    """Return how many characters fit into a vocabulary. Most need two tokens: at the start of a word and inside it."""
    return max(1, (vocab_size - N_SPECIAL) // 2)


def alphabet_of(tokenizer: Tokenizer) -> set[str]:
    """Return the characters that the vocabulary contains, at the start of a word or inside it."""
    return {text for text in (token.removeprefix("##") for token in tokenizer.get_vocab()) if len(text) == 1}


def _post_processor() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)],
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json that this suite has written.

    Raises InputError if the file is missing, is not a tokenizer or differs from the tokenizers of this suite.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        if system_trouble(error):
            raise
        raise InputError(f"{path} is not a tokenizer: {one_line(error)}") from error
    for token_id, token in enumerate(SPECIAL_TOKENS):
        if tokenizer.token_to_id(token) != token_id:
            raise InputError(f"{path}: {token} must have the id {token_id}, as in this suite's tokenizers")
    if different := _difference(tokenizer):
        raise InputError(f"{path} is not a tokenizer of this suite: {different}")
    tokenizer.no_truncation()  # transformers saves both settings with a tokenizer that has used them
    tokenizer.no_padding()
    return tokenizer


def _difference(tokenizer: Tokenizer) -> str:
    """Return how the tokenizer differs from those that `train_tokenizer` returns, or "".

    A tokenizer without such a difference encodes every text, to ids of its vocabulary only.
    """
    ids = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    is_known_model = (
        isinstance(tokenizer.model, models.WordPiece) and tokenizer.model.unk_token == SPECIAL_TOKENS[UNK_ID]
    )
    if not is_known_model or tokenizer.get_vocab(with_added_tokens=False).get(SPECIAL_TOKENS[UNK_ID]) != UNK_ID:
        return "it is not a WordPiece model with [UNK] in its vocabulary"
    if not isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        return "its normalizer is not BERT's"
    known = _state(_pre_tokenizer()), _state(pre_tokenizers.BertPreTokenizer())  # the latter was used before FORMAT 4
    if tokenizer.pre_tokenizer is None or _state(tokenizer.pre_tokenizer) not in known:
        return "its pre-tokenizer is not BERT's"  # other regular expressions may not terminate
    if tokenizer.model.max_input_chars_per_word > LONGEST_WORD:
        return f"it looks up words longer than {LONGEST_WORD} characters, which is too slow"
    if sorted(ids.values()) != list(range(len(ids))):
        return f"the ids of its {len(ids):,} tokens are not exactly 0 to {len(ids) - 1:,}"
    if added != set(SPECIAL_TOKENS):
        return f"its added tokens are {', '.join(sorted(added))[:100]}"
    if tokenizer.post_processor is None or _state(tokenizer.post_processor) != _state(_post_processor()):
        return "it does not encode a text as [CLS] text [SEP]"
    return ""


def _state(part: pre_tokenizers.PreTokenizer | processors.PostProcessor) -> dict:
    """Return the JSON object that tokenizer.json contains for a part of a tokenizer."""
    return json.loads(part.__getstate__())


def token_names(tokenizer: Tokenizer) -> list[str]:
    """Return the tokens of the vocabulary by id."""
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Write the files from which transformers loads the tokenizer, with `AutoTokenizer` or with BERT's own classes.

    BERT's classes build their normalizer from tokenizer_config.json alone and lower-case text by default.
    """
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(folder / VOCABULARY, "".join(token + "\n" for token in token_names(tokenizer)))
    normalizer = tokenizer.normalizer
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_seq_len,
            "do_lower_case": normalizer.lowercase,
            "strip_accents": normalizer.strip_accents,
            "tokenize_chinese_chars": normalizer.handle_chinese_chars,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            **dict(zip(roles, SPECIAL_TOKENS, strict=True)),
        },
    )


def _training_sample(corpus: Corpus, seed: int, check_stop: Callable[[], None]) -> list[str]:
    """Return about SAMPLE_CHARACTERS of text from documents that cannot be held out, or of all if there are no others.

    Raises InputError if there is no text.
    """
    sample: list[str] = []
    may_be_held_out: list[str] = []
    n_rows = 0
    for rows in corpus.head(SAMPLE_CHARACTERS):
        check_stop()
        n_rows += len(rows)
        for text in filter(None, map(clean, rows)):
            starts = range(0, min(len(text), SAMPLE_CHARACTERS), PIECE_CHARACTERS)
            pieces = [text[start : start + PIECE_CHARACTERS] for start in starts]
            (sample if split_hash(text, seed) >= HELD_OUT_SHARE * 2**64 else may_be_held_out).extend(pieces)
    if not sample and not may_be_held_out:
        raise InputError(f"{corpus.description}: no text found (rows read: {n_rows:,}, all empty)")
    return sample or may_be_held_out


def _continues_a_word(character: str) -> bool:
    """Return False for punctuation and Chinese characters, which BERT's pre-tokenizer always splits off."""
    code = ord(character)
    punctuation = (
        33 <= code <= 47
        or 58 <= code <= 64
        or 91 <= code <= 96
        or 123 <= code <= 126
        or unicodedata.category(character).startswith("P")
    )
    chinese = (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x2CEAF
        or 0xF900 <= code <= 0xFAFF
        or 0x2F800 <= code <= 0x2FA1F
    )
    return not punctuation and not chinese
