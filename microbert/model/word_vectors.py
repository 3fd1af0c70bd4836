"""Initial word embeddings from the neighbours that words have in the training text.

Words that occur beside the same words get similar vectors, before the first step: the largest singular vectors of the
matrix of positive pointwise mutual information, which word2vec factorises implicitly (Levy and Goldberg 2014, Neural
Word Embedding as Implicit Matrix Factorization). A run need not spend its first hundreds of steps on learning them.
All embeddings also share one random vector. In a model without biases, nothing else is common to all tokens, and
attention that depends on the distance alone needs a query and a key that do not depend on the words. On the logits the
shared vector has no effect: it adds the same number to all of them. docs/experiments.md has what both are worth.
Shapes: I ids, V vocabulary, D = n_embed, P pairs of words that occur near each other.
"""

import numpy as np
import torch
from torch import Tensor

from microbert.config.constants import Config
from microbert.data.documents import Documents
from microbert.data.shards import Tokens
from microbert.data.tokenizer import N_SPECIAL
from microbert.model.layers import MaskedLanguageModel

MOST_IDS = 4_000_000  # ids that are read, at most: more text changes frequent words little
SLICE = 4_096  # ids that are read in one place
WINDOW = 4  # a pair is at most so many tokens apart, and counts 1 / distance
SMOOTHING = 0.75  # exponent on the words' shares, so that rare words are not taken for informative (Levy et al. 2015)
RMS = 0.05  # of the vectors, as after a few hundred steps
SHARED_RMS = 0.05  # of the vector that all embeddings share
OVERSAMPLING, ITERATIONS = 16, 3  # of the randomised singular value decomposition


@torch.no_grad()
def start_from_neighbours(model: MaskedLanguageModel, tokens: Tokens, config: Config) -> int:
    """Set the word embeddings of a new model, if `embedding_init` says so, and return how many have neighbours.

    Those without neighbours keep theirs, plus the shared vector.
    """
    if config.embedding_init == "random":
        return 0
    weight = model.output_weight
    vectors = word_vectors(count_neighbours(sample_ids(tokens), len(weight)), weight.shape[1], config.seed)
    is_known = vectors.any(dim=1)
    weight[is_known.to(weight.device)] = vectors[is_known].to(weight)
    generator = torch.Generator().manual_seed(config.seed)
    weight += (SHARED_RMS * torch.randn(weight.shape[1], generator=generator)).to(weight)
    return int(is_known.sum())


def sample_ids(tokens: Tokens) -> np.ndarray:
    """Return at most MOST_IDS ids of the training text, in slices from all of it: int64 [I]. Special tokens count."""
    ids = tokens.train.ids if isinstance(tokens.train, Documents) else tokens.train.rows.reshape(-1)
    n_slices = -(-len(ids) // SLICE)
    wanted = min(n_slices, MOST_IDS // SLICE)
    starts = np.arange(wanted) * n_slices // wanted * SLICE
    return np.concatenate([ids[start : start + SLICE] for start in starts]).astype(np.int64)


def count_neighbours(ids: np.ndarray, vocab_size: int) -> Tensor:
    """Return how often tokens occur near each other, weighted by 1 / distance: symmetric sparse [V, V].

    Special tokens have no neighbours. ids: int64 [I], running text.
    """
    counts = _sparse(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), vocab_size)
    for distance in range(1, min(WINDOW, len(ids) - 1) + 1):
        both = np.sort(np.stack([ids[:-distance], ids[distance:]]), axis=0)  # the order of two words does not matter
        pairs = torch.from_numpy(both[:, both[0] >= N_SPECIAL])
        counts = counts + _sparse(pairs, torch.full((pairs.shape[1],), 1 / distance), vocab_size)
    return (counts + counts.t()).coalesce()


def _sparse(pairs: Tensor, values: Tensor, vocab_size: int) -> Tensor:
    """Return a sparse matrix, [V, V], with the sum of each pair's values. pairs: int64 [2, P]. values: [P]."""
    return torch.sparse_coo_tensor(pairs, values, (vocab_size, vocab_size), check_invariants=False).coalesce()


def word_vectors(counts: Tensor, n_embed: int, seed: int) -> Tensor:
    """Return a vector for each token, of mean 0 and root mean square RMS: [V, D]. Zeros where nothing is known.

    counts: symmetric sparse [V, V]. The vectors are about the D largest singular vectors of the positive pointwise
    mutual information, times the square roots of the singular values (Levy et al. 2015, Improving Distributional
    Similarity with Lessons Learned from Word Embeddings), turned at random, so that all D numbers are of equal size.
    """
    pairs, shares = counts.indices(), counts.values().double() / counts.values().double().sum()
    of_word = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, pairs[0], shares)
    smoothed = of_word**SMOOTHING / (of_word**SMOOTHING).sum()
    expected = (of_word.log() + smoothed.log()) / 2  # one of a pair is a word, the other its context
    information = (shares.log() - expected[pairs].sum(dim=0)).clamp_min(0).float()
    matrix = _sparse(pairs, information, len(counts))
    generator = torch.Generator().manual_seed(seed)
    rank = min(n_embed, len(counts))
    basis = torch.randn(len(counts), min(rank + OVERSAMPLING, len(counts)), generator=generator)
    for _ in range(ITERATIONS):  # Halko et al. 2009, arXiv:0909.4061, algorithm 4.4; the matrix is symmetric
        basis = torch.linalg.qr(torch.sparse.mm(matrix, basis)).Q
    left, singular, _ = torch.linalg.svd(torch.sparse.mm(matrix, basis), full_matrices=False)
    rotation = torch.linalg.qr(torch.randn(n_embed, n_embed, generator=generator)).Q
    vectors = left[:, :rank] * singular[:rank].sqrt() @ rotation[:rank]
    is_known = torch.zeros(len(counts)).index_add_(0, pairs[0], information) > 0
    vectors = torch.where(is_known[:, None], vectors - vectors[is_known].mean(dim=0), 0.0)
    return vectors * (RMS / vectors[is_known].pow(2).mean().sqrt()) if is_known.any() else torch.zeros_like(vectors)
