"""Tiny models, rows of tokens and batches for the tests."""

import types

import numpy as np
import torch
from hypothesis import settings

from microbert.data.batches import Batch
from microbert.data.documents import Documents
from microbert.data.shards import Sequences
from microbert.data.tokenizer import CLS_ID, N_SPECIAL, PAD_ID, SEP_ID
from microbert.model.build import new_model
from microbert.model.layers import ModelConfig

VOCAB_SIZE = 60
few_examples = settings(max_examples=20, deadline=None)
many_examples = settings(max_examples=100, deadline=None)  # no deadline: the machine may be busy


def on_threads(n, function, *arguments):
    """Return the function's result computed with n threads of torch."""
    n_before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(n_before)


def token_rows(n, max_seq_len=16, vocab_size=VOCAB_SIZE, seed=0, shortest=1):
    """Return rows of [CLS], `shortest` to max_seq_len - 2 ordinary tokens, [SEP] and padding: int64 [n, T]."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(N_SPECIAL, vocab_size, (n, max_seq_len))
    rows[:, 0] = CLS_ID
    for row, length in zip(rows, rng.integers(shortest, max_seq_len - 1, n), strict=True):
        row[length + 1] = SEP_ID
        row[length + 2 :] = PAD_ID
    return rows


def as_sequences(rows):
    return Sequences(rows.astype(np.uint16))


def with_text(ids):
    """Return tokens whose training documents have this text. ids: [I], without special tokens between documents."""
    no_pieces = np.zeros(0, np.uint64), np.zeros((0, 0, 0), np.int64)
    return types.SimpleNamespace(train=Documents(ids.astype(np.uint16), *no_pieces, (8,)))


def as_batch(rows, sequence_ids=None, epoch=0, real=True):
    n = len(rows)
    ids = np.arange(n) if sequence_ids is None else np.asarray(sequence_ids)
    return Batch(
        rows, ids, np.broadcast_to(np.asarray(epoch), n).copy(), np.broadcast_to(np.asarray(real, bool), n).copy()
    )


def noise_(model, std=0.3, seed=0):
    """Fill every parameter with normal noise, including biases and norms, so that each affects the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std, generator=generator)
    return model.eval()


def noisy_model(
    n_layers=2, n_heads=2, n_embed=8, max_seq_len=16, vocab_size=VOCAB_SIZE, seed=0, dropout=0.0, arch="bert"
):
    return noise_(new_model(ModelConfig(vocab_size, n_layers, n_heads, n_embed, max_seq_len, dropout, arch)), seed=seed)
