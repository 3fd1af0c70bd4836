"""Counts of a prepared corpus: documents, words, tokens, and what was skipped."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class CorpusCounts:
    """Counts of a prepared corpus. rows = empty + documents; documents = train + held_out + unknown + unknown_start.

    Characters, bytes, words, tokens and unknown_tokens include skipped documents and the ends that truncation removes.
    """

    rows: int
    empty: int
    documents: int
    unknown: int  # documents skipped because they contain no known token
    unknown_start: int  # documents skipped because their first max_seq_len - 2 tokens contain no known token
    unknown_sequences: int  # packed sequences, or pieces, skipped because they contain no known token
    train: int
    held_out: int
    duplicates: int  # documents with the same text as an earlier one; they are not skipped
    characters: int
    bytes: int  # of the text in UTF-8
    words: int
    tokens: int
    unknown_tokens: int

    @property
    def tokens_per_word(self) -> float:
        """Return the mean number of tokens of a word."""
        return self.tokens / self.words

    @property
    def unknown_rate(self) -> float:
        """Return the share of unknown tokens."""
        return self.unknown_tokens / self.tokens

    def bits_per_byte(self, loss: float) -> float:
        """Convert a loss in nats per token into bits per byte of text, which is comparable between vocabularies."""
        return loss / math.log(2) * self.tokens / self.bytes
