"""The first documents of files, encoded in memory."""

import gzip
import json

import numpy as np
import pytest
from prepared import prepare

from microbert.data.first_documents import encode_documents, read_first_documents
from microbert.data.tokenizer import N_SPECIAL, PAD_ID
from microbert.errors import InputError


def write_json_lines(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


def test_the_first_rows_with_text_are_read_across_files(tmp_path):
    first = write_json_lines(tmp_path / "a.jsonl", ["one", "", None, "two"])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for at_most, texts in ((1, ["one"]), (3, ["one", "two", "one"]), (9, ["one", "two"] * 2)):
        description, found = read_first_documents(f"{first},{tmp_path / 'b.jsonl.gz'}", None, at_most)
        assert found == texts and f"the first {len(texts)} document" in description


def test_the_column_can_be_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("title,body\nfirst title,first body of a text\nsecond title,second body of a text\n")
    description, texts = read_first_documents(str(path), "body", 10)
    assert texts == ["first body of a text", "second body of a text"] and '"body"' in description
    with pytest.raises(InputError, match="text_column"):
        read_first_documents(str(path), "other", 10)


def test_the_bundled_reviews_need_no_file():
    description, texts = read_first_documents("imdb", None, 2)
    assert len(texts) == 2 and len(texts[0]) > 100 and "bundled" in description


@pytest.mark.parametrize("content, words", [(None, "no such file"), ("", "no rows"), ('{"text": " "}\n', "no text")])
def test_without_text_it_is_an_error(content, words, tmp_path):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=words):
        read_first_documents(str(path), None, 10)


def test_documents_are_encoded_as_those_that_are_held_out(tmp_path):
    _, corpus, tokenizer, tokens = prepare(tmp_path)
    texts = [row for rows, _ in corpus.read() for row in rows]
    encoded = encode_documents(tokenizer, [*texts, "film " * 600])
    rows = {tuple(row) for row in encoded.documents.tolist()}
    assert all(tuple(row) in rows for row in tokens.held_out_documents.tolist())
    assert (encoded.documents[-1] != PAD_ID).all() and encoded.documents.shape[1] == 510
    film = tokenizer.token_to_id("film")
    n_films = sum(text.split().count("film") for text in texts) + 600  # beyond the row too
    assert encoded.token_counts[film] == n_films and not encoded.token_counts[:N_SPECIAL].any()
    assert encoded.bytes == sum(len(text) for text in texts) + len("film " * 600)
    assert encoded.tokens == np.sum([len(tokenizer.encode(text).ids) - 2 for text in texts]) + 600
