"""Documents cut into pieces: every token, whole rows, the first piece at the start."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import many_examples

from microbert.data.pieces import LONGEST_PART, MOST_WASTE, PLANS, cut_documents
from microbert.data.row_lengths import DRAWN_SHARES, draw_weights

LENGTHS = tuple(DRAWN_SHARES)
document_sizes = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 3000)), max_size=12)
some_lengths = st.sampled_from([LENGTHS, (8, 16, 32), (3,), (8, 13), (*LENGTHS, 1024)])


def cut(sizes, lengths=LENGTHS, first=0, seed=5, plan=0):
    """Return the pieces as tuples of document, start in it, size and row length, sorted."""
    sizes = np.array(sizes, np.int64)
    pieces = cut_documents(sizes, first, seed, plan, lengths, draw_weights(lengths))
    ends = np.cumsum(sizes)
    documents = np.searchsorted(ends, pieces.starts, side="right")
    starts = pieces.starts - (ends - sizes)[documents]
    of_rows = np.array(lengths)[pieces.lengths]
    return sorted(zip(*(x.tolist() for x in (documents, starts, pieces.sizes, of_rows)), strict=True))


@many_examples
@given(document_sizes, some_lengths, st.integers(0, PLANS - 1), st.integers(0, 2**63 - 1))
def test_pieces_cover_every_token_and_fill_their_rows(sizes, lengths, plan, seed):
    pieces = cut(sizes, lengths, plan=plan, seed=seed)
    covered = [np.zeros(size, bool) for size in sizes]
    for document, start, size, length in pieces:
        assert length in lengths and start >= 0 and start + size <= sizes[document]
        assert size == length - 2 or (size == sizes[document] < length - 2)  # full, or a whole document
        covered[document][start : start + size] = True
    assert all(of_document.all() for of_document in covered)
    first = {document: start for document, start, *_ in reversed(pieces)}
    assert first == dict.fromkeys(range(len(sizes)), 0)


@many_examples
@given(document_sizes)
def test_few_tokens_are_repeated_or_padding(sizes):
    of_document = {}
    for document, start, size, length in cut(sizes):
        of_document.setdefault(document, []).append((start, size, length))
    for document, pieces in of_document.items():
        wasted = sum(size for _, size, _ in pieces) - sizes[document]
        wasted += sum(length - 2 - size for _, size, length in pieces)
        longest = max(length for *_, length in pieces)
        assert wasted <= max(LENGTHS[0] - 3, MOST_WASTE * (longest - 2))  # only the last piece wastes


@many_examples
@given(document_sizes, st.data())
def test_the_cuts_of_a_document_depend_on_its_number_alone(sizes, data):
    at = data.draw(st.integers(0, len(sizes)))
    parts = cut(sizes[:at]) + [(document + at, *rest) for document, *rest in cut(sizes[at:], first=at)]
    assert parts == cut(sizes)


def test_plans_and_seeds_cut_differently():
    sizes = [500] * 20
    kinds = [cut(sizes, plan=plan) for plan in range(PLANS)] + [cut(sizes, seed=6)]
    assert all(kinds[i] != kinds[j] for i in range(len(kinds)) for j in range(i))


def test_the_lengths_of_long_documents_are_drawn_with_the_shares():
    pieces = cut([LONGEST_PART] * 400)
    tokens = np.array([length for *_, length in pieces])
    shares = [(tokens == length).sum() * length / tokens.sum() for length in LENGTHS]
    assert shares == pytest.approx(list(DRAWN_SHARES.values()), abs=0.03)


def test_a_very_long_document_is_cut_in_parts_at_once():
    size = 3 * LONGEST_PART + 1
    pieces = cut([size])
    assert {start + size for _, start, size, _ in pieces} >= {LONGEST_PART, 2 * LONGEST_PART, size}
    assert all(size == length - 2 for _, _, size, length in pieces)  # the last token has a full row too
