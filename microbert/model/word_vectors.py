"""Initial word embeddings from the neighbours that words have in the training text.

Words that occur beside the same words get similar vectors, before the first step: the largest singular vectors of the
matrix of positive pointwise mutual information, which word2vec factorises implicitly (Levy and Goldberg 2014, Neural
Word Embedding as Implicit Matrix Factorization). A run need not spend its first hundreds of steps on learning them.
All embeddings also share one random vector. In a model without biases, nothing else is common to all tokens, and
attention that depends on the distance alone needs a query and a key that do not depend on the words. On the logits the
shared vector has no effect: it adds the same number to all of them. docs/experiments.md has what both are worth.
Shapes: I ids, V vocabulary, D = n_embed, P pairs of words that occur near each other.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from microbert.config.constants import Config
from microbert.data.documents import Documents
from microbert.data.shards import Tokens
from microbert.data.tokenizer import N_SPECIAL
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.counter_rng import random_bits
from microbert.runtime.waiting import never_stop

MOST_IDS = 4_000_000  # ids that are read, at most: more text changes frequent words little
SLICE = 4_096  # ids that are read in one place
COUNTED_IDS = 500_000  # ids whose pairs are in memory at a time
WINDOW = 4  # a pair is at most so many tokens apart, and counts 1 / distance
SMOOTHING = 0.75  # exponent on the words' shares, so that rare words are not taken for informative (Levy et al. 2015)
RMS = 0.05  # of the vectors, as after a few hundred steps
SHARED_RMS = 0.05  # of the vector that all embeddings share
OVERSAMPLING, ITERATIONS = 16, 3  # of the randomised singular value decomposition
SMALLEST = 1e-12  # divisor
STREAM = 5  # of random numbers, other than those of build_model and the classifier

CheckStop = Callable[[], None]


@torch.no_grad()
def start_from_neighbours(
    model: MaskedLanguageModel, tokens: Tokens, config: Config, check_stop: CheckStop = never_stop
) -> None:
    """Set the word embeddings of a new model, if `embedding_init` says so.

    Those without neighbours keep theirs, plus the shared vector. check_stop: called about every second; an exception
    from it ends the work.
    """
    if config.embedding_init == "random":
        return
    generator = torch.Generator().manual_seed(int(random_bits(config.seed, STREAM)[0] >> np.uint64(1)))
    weight = model.output_weight
    information = mutual_information(count_neighbours(sample_ids(tokens), len(weight), check_stop))
    vectors = word_vectors(information, weight.shape[1], generator, check_stop)
    is_known = vectors.any(dim=1)
    weight[is_known.to(weight.device)] = vectors[is_known].to(weight)
    weight += (SHARED_RMS * torch.randn(weight.shape[1], generator=generator)).to(weight)


def sample_ids(tokens: Tokens) -> np.ndarray:
    """Return at most MOST_IDS ids of the training text, in slices from all of it: int64 [I]. Special tokens count.

    With rows = "documents", nothing separates documents, so a few pairs of two documents are counted too.
    """
    ids = tokens.train.ids if isinstance(tokens.train, Documents) else tokens.train.rows.reshape(-1)
    n_slices = -(-len(ids) // SLICE)
    wanted = min(n_slices, MOST_IDS // SLICE)
    starts = np.arange(wanted) * n_slices // wanted * SLICE
    return np.concatenate([ids[start : start + SLICE] for start in starts]).astype(np.int64)


def count_neighbours(ids: np.ndarray, vocab_size: int, check_stop: CheckStop = never_stop) -> Tensor:
    """Return how often tokens occur near each other, weighted by 1 / distance: symmetric sparse [V, V].

    Special tokens have no neighbours. ids: int64 [I], running text.
    """
    counts = _sparse(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), vocab_size)
    for start in range(0, len(ids), COUNTED_IDS):
        for distance in range(1, WINDOW + 1):
            check_stop()
            second = ids[start + distance : start + distance + COUNTED_IDS]
            pairs = np.sort(np.stack([ids[start : start + len(second)], second]), axis=0)  # their order does not matter
            ordinary = torch.from_numpy(pairs[:, pairs[0] >= N_SPECIAL])
            counts = counts + _sparse(ordinary, torch.full((ordinary.shape[1],), 1 / distance), vocab_size)
    return (counts + counts.t()).coalesce()


def _sparse(pairs: Tensor, values: Tensor, vocab_size: int) -> Tensor:
    """Return a sparse matrix, [V, V], with the sum of each pair's values. pairs: int64 [2, P]. values: [P]."""
    return torch.sparse_coo_tensor(pairs, values, (vocab_size, vocab_size), check_invariants=False).coalesce()


def mutual_information(counts: Tensor) -> Tensor:
    """Return the positive pointwise mutual information of words and their neighbours: symmetric sparse [V, V].

    It is that of a pair, with SMOOTHING on the neighbour's share, in nats, where one of both is the neighbour and where
    the other is, in the mean.
    """
    pairs, shares = counts.indices(), counts.values() / counts.values().sum(dtype=torch.float64).float()
    of_word = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, pairs[0], shares.double())
    smoothed = of_word**SMOOTHING / (of_word**SMOOTHING).sum()
    expected = ((of_word.log() + smoothed.log()) / 2).float()
    values = shares.log_().sub_(expected[pairs[0]]).sub_(expected[pairs[1]]).clamp_min_(0)
    return torch.sparse_coo_tensor(pairs, values, counts.shape, check_invariants=False, is_coalesced=True)


def word_vectors(
    information: Tensor, n_embed: int, generator: torch.Generator, check_stop: CheckStop = never_stop
) -> Tensor:
    """Return a vector for each token, of mean 0 and root mean square RMS: [V, D]. Zeros where nothing is known.

    information: symmetric sparse [V, V], of `mutual_information`. The vectors are about those of its D largest singular
    values, times the square roots of these (Levy et al. 2015, Improving Distributional Similarity with Lessons Learned
    from Word Embeddings), turned at random, so that all D numbers are of equal size.
    """
    V = len(information)
    rank = min(n_embed, V)
    basis = torch.randn(V, min(rank + OVERSAMPLING, V), generator=generator)
    for _ in range(ITERATIONS):  # Halko et al. 2009, arXiv:0909.4061, algorithm 4.4; the matrix is symmetric
        check_stop()
        basis = torch.linalg.qr(torch.sparse.mm(information, basis)).Q
    check_stop()
    left, singular, _ = torch.linalg.svd(torch.sparse.mm(information, basis), full_matrices=False)
    left = left[:, :rank]
    # The sign of a singular vector depends on rounding, so on threads. The turn that is closest to fixed random numbers
    # follows it, and the vectors do not change (orthogonal Procrustes problem).
    turn, _, turned = torch.linalg.svd(left.T @ torch.randn(V, n_embed, generator=generator), full_matrices=False)
    vectors = left * singular[:rank].sqrt() @ (turn @ turned)
    is_known = torch.zeros(V).index_add_(0, information.indices()[0], information.values()) > 0
    if is_known.sum() < 2:  # a single vector is its own mean
        return torch.zeros_like(vectors)
    vectors = torch.where(is_known[:, None], vectors - vectors[is_known].mean(dim=0), 0.0)
    return vectors * (RMS / vectors[is_known].pow(2).mean().sqrt().clamp_min(SMALLEST))
