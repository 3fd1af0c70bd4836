"""Loss by input length: the rows and their masks, the sums, and transformers' logits."""

import math

import numpy as np
import pytest
import torch
import transformers
from models import VOCAB_SIZE, noisy_model

from microbert.data.masking import IGNORED
from microbert.data.tokenizer import CLS_ID, MASK_ID, N_SPECIAL, PAD_ID, SEP_ID, UNK_ID, train_tokenizer
from microbert.model.build import log_frequencies
from microbert.model.export import save_model
from microbert.train.by_length import (
    AT_THE_END,
    LENGTHS,
    MOST_DRAWS,
    HeldOutText,
    Sample,
    choose_documents,
    loss_by_length,
    masked_rows,
    score,
    thorough,
    tokens_to_read,
)

SEED = 5


def documents(*lengths, vocab_size=VOCAB_SIZE, width=40):
    """Return documents with so many ids, padded to the width."""
    rng = np.random.default_rng(1)
    rows = np.full((len(lengths), width), PAD_ID, np.uint16)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = rng.integers(N_SPECIAL, vocab_size, length)
    return rows


def text_of(rows, vocab_size=VOCAB_SIZE, counts=None):
    counts = np.arange(vocab_size) if counts is None else counts
    return HeldOutText(rows, np.where(np.arange(vocab_size) < N_SPECIAL, 0, counts), lambda loss: loss / 2)


def all_samples(documents=1000, draws=3):
    return dict.fromkeys(LENGTHS, Sample(documents, draws))


def test_a_row_is_the_beginning_of_a_document_between_cls_and_sep():
    rows = documents(6, 20, 30)
    masked = masked_rows(rows, np.array([2, 0, 1]), np.array([0, 4, 1]), 8, SEED)
    used = masked.labels != IGNORED
    restored = masked.input_ids.copy()
    assert (np.take_along_axis(restored, masked.positions, axis=1)[used] == MASK_ID).all()  # never another token
    np.put_along_axis(restored, np.where(used, masked.positions, 0), np.where(used, masked.labels, CLS_ID), axis=1)
    assert (restored[:, 0] == CLS_ID).all() and (restored[:, -1] == SEP_ID).all()
    np.testing.assert_array_equal(restored[:, 1:-1], rows[[2, 0, 1], :6])
    assert (used.sum(axis=1) == 1).all()  # 15 % of 6 tokens, rounded up or down, at least one


def test_the_masks_depend_on_the_document_and_the_draw_alone():
    rows = documents(*[30] * 20)
    together = masked_rows(rows, np.repeat(np.arange(20), 3), np.tile(np.arange(3), 20), 32, SEED)
    alone = masked_rows(rows, np.array([7]), np.array([2]), 32, SEED)
    np.testing.assert_array_equal(together.input_ids[7 * 3 + 2], alone.input_ids[0])
    of_draws = {tuple(row) for row in together.input_ids[21:24].tolist()}
    assert len(of_draws) == 3
    other = masked_rows(rows, np.array([7]), np.array([2]), 32, SEED + 1)
    assert (other.input_ids != alone.input_ids).any()


def test_15_percent_of_the_tokens_are_masked():
    masked = masked_rows(documents(*[38] * 500), np.arange(500), np.zeros(500, int), 40, SEED)
    assert masked.n_masked / (500 * 38) == pytest.approx(0.15, abs=0.003)


def test_only_documents_that_are_long_enough_are_chosen():
    rows = documents(5, 6, 7, 14, 13, 38)
    assert set(choose_documents(rows, 8, 100, SEED)) == {1, 2, 3, 4, 5}
    assert set(choose_documents(rows, 16, 100, SEED)) == {3, 5}
    assert len(choose_documents(rows, 8, 2, SEED)) == 2
    assert not len(choose_documents(rows, 64, 100, SEED))  # more than the ids that are stored


def test_a_document_of_unknown_tokens_is_not_chosen():
    rows = documents(10, 10)
    rows[0, :6] = UNK_ID
    assert choose_documents(rows, 8, 100, SEED).tolist() == [1]


def test_documents_of_two_lengths_are_the_same_as_far_as_possible():
    rows = documents(*[14] * 30, *[38] * 30)
    of_8, of_32 = (choose_documents(rows, length, 20, SEED).tolist() for length in (8, 32))
    assert [number for number in of_8 if number >= 30] == of_32[: sum(number >= 30 for number in of_8)]


def constant_model(counts, max_seq_len=40):
    """Return a model that guesses by frequency, whatever it reads."""
    model = noisy_model(max_seq_len=max_seq_len, vocab_size=len(counts))
    with torch.no_grad():
        model.output_weight.zero_()
        model.output_bias.copy_(log_frequencies(torch.from_numpy(counts)))
    return model.eval()


def test_a_model_that_guesses_by_frequency_has_the_unigram_loss():
    text = text_of(documents(*[38] * 30, *[10] * 10))
    result = loss_by_length(constant_model(text.token_counts), text, all_samples(), SEED)
    assert [one.length for one in result.scores] == [8, 16, 32] and result.missing == []
    for one in result.scores:
        assert one.loss == pytest.approx(one.unigram_loss, rel=1e-5)
        assert one.bits_per_byte == one.loss / 2


def test_the_unigram_loss_is_that_of_the_masked_tokens():
    counts = np.zeros(VOCAB_SIZE, np.int64)
    counts[10], counts[20] = 30, 10
    rows = np.full((4, 40), 10, np.uint16)
    rows[:2] = 20  # half of the documents
    text = text_of(rows, counts=counts)
    [one] = loss_by_length(noisy_model(max_seq_len=8), text, all_samples(draws=1), SEED).scores
    total = 40 + 0.5 * VOCAB_SIZE
    assert one.unigram_loss == pytest.approx(-(math.log(30.5 / total) + math.log(10.5 / total)) / 2)
    assert (one.documents, one.masked_tokens) == (4, 4)


def test_the_result_is_the_same_in_batches_of_any_size_and_changes_no_weight():
    text, model = text_of(documents(*[38] * 10, *[10] * 5)), noisy_model(max_seq_len=40, arch="modern")
    before = [parameter.clone() for parameter in model.parameters()]
    first = loss_by_length(model, text, all_samples(), SEED)
    for batch_tokens in (1, 100):  # one row at a time; a few
        for one, other in zip(
            first.scores, loss_by_length(model, text, all_samples(), SEED, batch_tokens).scores, strict=True
        ):
            assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.change == pytest.approx(
                other.change, abs=1e-4
            )
            assert one.masked_tokens == other.masked_tokens and one.accuracy == other.accuracy
    assert first == loss_by_length(model, text, all_samples(), SEED)
    assert all(map(torch.equal, before, model.parameters()))


def test_the_change_compares_the_same_documents():
    """Only the long documents count at 16 tokens, so their loss at 8 is what the change starts from."""
    rows = documents(*[8] * 20, *[38] * 5)
    text, model = text_of(rows), noisy_model(max_seq_len=16)
    at_8, at_16 = loss_by_length(model, text, all_samples(), SEED).scores
    long_only = loss_by_length(model, text_of(rows), all_samples(), SEED)
    sums = score(model, text, choose_documents(rows, 16, 1000, SEED), 8, 3, SEED)
    assert (at_8.documents, at_16.documents) == (25, 5) and at_8.change is None
    assert at_16.change == pytest.approx(at_16.loss - sums.loss / sums.masked, abs=1e-5)
    assert at_16.change != pytest.approx(at_16.loss - at_8.loss, abs=1e-3)
    assert long_only.scores[1] == at_16


def test_with_few_documents_a_length_those_of_the_next_count_for_the_change():
    """The two lengths share no document, if the order has short ones first and few are taken."""
    rows = documents(*[8] * 50, *[38] * 2)
    order = choose_documents(rows, 8, 52, SEED).tolist()
    assert not {50, 51} & set(order[:1])
    text, model = text_of(rows), noisy_model(max_seq_len=16)
    at_8, at_16 = loss_by_length(model, text, all_samples(documents=1), SEED).scores
    sums = score(model, text, choose_documents(rows, 16, 1, SEED), 8, 3, SEED)
    assert (at_8.documents, at_8.masked_tokens) == (1, 3)
    assert at_16.change == pytest.approx(at_16.loss - sums.loss / sums.masked, abs=1e-5)


@pytest.mark.parametrize("max_seq_len, lengths", [(7, []), (8, [8]), (33, [8, 16, 32])])
def test_lengths_are_those_that_the_positions_allow(max_seq_len, lengths):
    result = loss_by_length(noisy_model(max_seq_len=max_seq_len), text_of(documents(38)), all_samples(), SEED)
    assert [one.length for one in result.scores] == lengths and result.missing == []


def test_lengths_without_a_document_are_named():
    result = loss_by_length(noisy_model(max_seq_len=40), text_of(documents(8, 9)), all_samples(), SEED)
    assert [one.length for one in result.scores] == [8] and result.missing == [16, 32]
    assert result == loss_by_length(noisy_model(max_seq_len=40), text_of(documents(8, 9)), all_samples(), SEED)
    empty = loss_by_length(noisy_model(max_seq_len=40), text_of(documents()), all_samples(), SEED)
    assert empty.scores == [] and empty.missing == [8, 16, 32]


@pytest.mark.parametrize("arch", ["bert", "modern"])
@torch.no_grad()
def test_the_loss_is_that_of_transformers(arch, tmp_path):
    tokenizer = train_tokenizer(
        lambda: iter(["a great film", "a bad story"] * 3), vocab_size=60, lowercase=True, strip_accents=False
    )
    vocab_size = tokenizer.get_vocab_size()
    model = noisy_model(n_embed=16, vocab_size=vocab_size, max_seq_len=40, arch=arch)
    save_model(model, tokenizer, tmp_path)
    rows = documents(*[38] * 6, vocab_size=vocab_size)
    result = loss_by_length(model, text_of(rows, vocab_size), all_samples(draws=1), SEED)
    masked = masked_rows(rows, np.arange(6), np.zeros(6, int), 32, SEED)
    labels = np.full_like(masked.input_ids, IGNORED)
    for row, positions, of_row in zip(labels, masked.positions, masked.labels, strict=True):
        row[positions[of_row != IGNORED]] = of_row[of_row != IGNORED]
    stock = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    logits = stock(input_ids=torch.from_numpy(masked.input_ids)).logits
    used = labels != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[used], torch.from_numpy(labels[used]))
    correct = (logits[used].argmax(dim=1).numpy() == labels[used]).mean()
    assert result.scores[2].loss == pytest.approx(float(expected), abs=1e-4)
    assert result.scores[2].accuracy == pytest.approx(correct) and result.scores[2].masked_tokens == used.sum()


def test_few_documents_have_more_draws():
    for length in LENGTHS:
        sample = AT_THE_END[length]
        assert 1 <= sample.draws_for(sample.documents, length) * sample.documents * length <= 20_000
        assert sample.draws_for(1, length) == min(MOST_DRAWS, 20_000 // length)
    assert all(thorough(1000)[length].draws_for(1000, length) >= 20 for length in (8, 16, 32))


@pytest.mark.parametrize("lengths", [[38] * 30 + [10] * 10, [8] * 50 + [38] * 2, [8], []])
def test_the_tokens_to_read_are_those_that_the_model_reads(lengths, monkeypatch):
    model, text, read = noisy_model(max_seq_len=40), text_of(documents(*lengths)), []
    real = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, ids, *others: read.append(ids.numel()) or real(self, ids, *others)
    )
    for samples in (all_samples(), all_samples(documents=1), AT_THE_END):
        read.clear()
        loss_by_length(model, text, samples, SEED)
        assert tokens_to_read(model, text, samples, SEED) == sum(read)
