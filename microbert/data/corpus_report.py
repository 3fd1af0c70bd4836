"""What a run prints about its corpus: the plan before preparing it, and the counts afterwards."""

import shutil
from pathlib import Path

from tokenizers import Tokenizer

from microbert.config.constants import Config
from microbert.data.corpus import Estimate
from microbert.data.documents import Documents
from microbert.data.shards import Tokens
from microbert.data.tokenizer import SAMPLE_CHARACTERS, SPECIAL_TOKENS, UNK_ID, alphabet_of, largest_alphabet

MANY_UNKNOWN = 0.01  # warn above this share of unknown tokens, or of documents skipped because of them


def preparation_plan(estimate: Estimate, token_megabytes: float, folder: Path) -> str:
    """Describe a preparation before it starts. folder: of the tokens; its parent must exist."""
    free = shutil.disk_usage(folder.parent).free / 1e6
    about = "" if estimate.is_exact else "about "
    plan = (
        f"preparing {about}{estimate.documents:,} documents, about {estimate.megabytes:,.1f} MB of text, in {folder}\n"
        f"disk: about {token_megabytes:,.1f} MB of tokens, twice that while preparing; {free / 1e3:,.0f} GB free"
    )
    if 2 * token_megabytes > free:
        plan += "\nwarning: the disk may be too small: reduce max_samples, or set cache_dir to a larger disk"
    return plan


def skipped_documents(empty: int, unknown: int, unknown_start: int, config: Config) -> str:
    """Return how many documents are skipped for each reason."""
    reasons = (
        (empty, "empty"),
        (unknown, "without a known token"),
        (unknown_start, f"without a known token among their first {config.max_seq_len - 2:,}"),
    )
    return ", ".join(f"{number:,} {why}" for number, why in reasons if number) or "none"


def corpus_report(tokens: Tokens, tokenizer: Tokenizer, config: Config) -> str:
    """Return the counts of the prepared corpus, and a warning if many tokens are unknown."""
    counts = tokens.corpus_counts
    skipped = skipped_documents(counts.empty, counts.unknown, counts.unknown_start, config)
    skipped_sequences = ""
    if counts.unknown_sequences:
        skipped_sequences = f"; {counts.unknown_sequences:,} skipped without a known token"
    lines = [
        f"documents: {counts.rows:,} read, {counts.train:,} for training, {counts.held_out:,} held out; "
        f"skipped: {skipped}; duplicates (kept): {counts.duplicates:,}",
        f"text: {counts.characters / 1e6:,.1f}M characters; vocabulary {len(tokens.token_counts):,}, "
        f"{counts.tokens_per_word:.2f} tokens per word, {counts.unknown_rate:.3%} unknown",
        *_rows(tokens, config, skipped_sequences),
        f"cache: {tokens.megabytes:,.1f} MB in {tokens.folder}",
    ]
    n_unknown = counts.unknown + counts.unknown_start
    if max(counts.unknown_rate, n_unknown / counts.documents) > MANY_UNKNOWN:
        lines.append(_unknown_warning(tokens, tokenizer, config))
    return "\n".join(lines)


def _rows(tokens: Tokens, config: Config, skipped: str) -> list[str]:
    """Return how many rows there are. skipped: those without a known token."""
    of_text, held_out = f"{tokens.token_counts.sum() / 1e6:,.2f}M tokens of text", f"{len(tokens.held_out):,} held out"
    sequences = f"sequences of {config.max_seq_len} tokens"
    if not isinstance(tokens.train, Documents):
        return [f"{sequences}: {len(tokens.train):,} for training with {of_text}, {held_out}{skipped}"]
    of_lengths = tokens.train.n_rows[0].reshape(-1, 2).sum(axis=1)  # full and padded
    numbers = ", ".join(f"{n:,} of {length}" for length, n in zip(tokens.train.row_lengths, of_lengths, strict=True))
    return [
        f"rows for training with {of_text}, by length in tokens: {numbers}{skipped}",
        f"{sequences}: {held_out}",
    ]


def _unknown_warning(tokens: Tokens, tokenizer: Tokenizer, config: Config) -> str:
    """Return how much of the text is unknown, why, and what helps."""
    counts, n_known = tokens.corpus_counts, len(alphabet_of(tokenizer))
    characters = dict(tokens.unknown_characters)
    literal = characters.pop(SPECIAL_TOKENS[UNK_ID], 0)
    warning = (
        f"warning: {counts.unknown_tokens:,} of {counts.tokens:,} tokens are unknown, and "
        f"{counts.unknown + counts.unknown_start:,} of {counts.documents:,} documents are skipped because of them"
    )
    if characters:
        named = ", ".join(f"{text} (U+{ord(text):04X}, {times:,} times)" for text, times in characters.items())
        warning += f". Words with these characters are unknown: {named}. The tokenizer knows {n_known:,} characters, "
        if n_known >= largest_alphabet(config.vocab_size):
            warning += f"the most that vocab_size = {config.vocab_size:,} allows: increase it"
        else:
            warning += (
                f"those of its training sample, at most the first {SAMPLE_CHARACTERS / 1e6:.0f}M characters of the "
                "corpus: add text with the other characters to it"
            )
    if literal:
        warning += f". {literal:,} of the unknown tokens are a literal [UNK] in the text"
    return warning
