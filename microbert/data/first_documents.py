"""The first documents of files, read and encoded in memory: text to look at, without a corpus and its cache.

Shapes: D documents, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from microbert.config.terminal import counted
from microbert.data.corpus import clean
from microbert.data.fast_encode import Encoder
from microbert.data.file_formats import describe_column, file_kind, find_text_column, read_rows
from microbert.data.local_files import readable_files
from microbert.data.shards import LONGEST_ROW
from microbert.data.sources import imdb_file, labelled_imdb
from microbert.data.tokenizer import N_SPECIAL, PAD_ID
from microbert.errors import InputError


@dataclasses.dataclass(frozen=True)
class EncodedDocuments:
    """documents: int32 [D, LONGEST_ROW - 2], the first ids of each, padded with PAD_ID. token_counts: int64 [V], how
    often each ordinary token occurs in the whole documents. tokens, bytes: of the whole documents."""

    documents: np.ndarray
    token_counts: np.ndarray
    tokens: int
    bytes: int


def read_first_documents(dataset: str, text_column: str | None, at_most: int) -> tuple[str, list[str]]:
    """Return a description, and the texts of the first rows that have one.

    dataset: "imdb", or paths of files. Raises InputError if they cannot be read, or contain no text.
    """
    texts: list[str] = []
    description, rows = _open(dataset, text_column)
    for row in rows:
        if text := clean(row):
            texts.append(text)
        if len(texts) == at_most:
            break
    if not texts:
        raise InputError(f"{dataset} contains no text")
    return f"{description}, the first {counted(len(texts), 'document')}", texts


def _open(dataset: str, text_column: str | None) -> tuple[str, Iterator[str | None]]:
    if dataset == "imdb":
        return "imdb (film reviews, bundled)", (text for text, _ in labelled_imdb(imdb_file()))
    paths = readable_files(dataset).paths
    if not paths:
        raise InputError(f'dataset = "{dataset}": no such file; use imdb, or paths of files')
    by_kind = sorted(paths, key=lambda path: file_kind(path) in (None, "text"))  # as a run does: tables first
    columns = ((path, find_text_column(path, text_column)) for path in by_kind)
    first, column = next(((path, found) for path, found in columns if found is not None), (paths[0], None))
    if column is None:
        raise InputError(f"{dataset} contains no rows")
    rows = (row for path in paths for batch in read_rows(path, column) for row in batch)
    return f"{dataset} ({describe_column(first, column)})", rows


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> EncodedDocuments:
    """Encode the texts as `prepare_tokens` encodes held-out documents."""
    ids, lengths = Encoder(tokenizer).encode(texts)
    documents = np.full((len(texts), LONGEST_ROW - 2), PAD_ID, np.int32)
    for row, end, length in zip(documents, np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
        n_used = min(length, len(row))
        row[:n_used] = ids[end - length : end - length + n_used]
    token_counts = np.bincount(ids, minlength=tokenizer.get_vocab_size())
    token_counts[:N_SPECIAL] = 0
    return EncodedDocuments(documents, token_counts, int(lengths.sum()), sum(len(text.encode()) for text in texts))
