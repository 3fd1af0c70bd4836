"""Initial word embeddings from the neighbours that words have in the training text.

Words that occur beside the same words get similar vectors before the first step: the singular vectors of the matrix of
positive pointwise mutual information, which word2vec factorises implicitly (Levy and Goldberg 2014, Neural Word
Embedding as Implicit Matrix Factorization). Otherwise a run spends its first hundreds of steps on learning them.
All embeddings also share one random vector. In a model without biases, nothing else is common to all tokens, and
attention that depends on the distance alone needs a query and a key that do not depend on the words. On the logits the
shared vector has no effect: it adds the same number to all of them. docs/experiments.md has what both are worth.
Shapes: V vocabulary, D = n_embed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from microbert.config.constants import Config
from microbert.data.neighbours import count_neighbours, sample_ids
from microbert.data.shards import Tokens
from microbert.model.layers import MaskedLanguageModel
from microbert.runtime.counter_rng import torch_generator
from microbert.runtime.waiting import never_stop

SMOOTHING = 0.75  # exponent on the neighbours' shares: without it, rare words look informative (Levy et al. 2015)
RMS = 0.05  # of the vectors, as after a few hundred steps
SHARED_RMS = 0.05  # of the vector that all embeddings share
OVERSAMPLING, ITERATIONS = 16, 3  # of the randomised singular value decomposition
LEAST_RMS = 1e-12  # of the vectors before scaling, to avoid a division by zero
STREAM = 5  # of random numbers, other than those of build_model and the classifier


@torch.no_grad()
def start_from_neighbours(
    model: MaskedLanguageModel, tokens: Tokens, config: Config, check_stop: Callable[[], None] = never_stop
) -> None:
    """Set the word embeddings of a new model, on any device, unless `embedding_init` is "random".

    Tokens without neighbours keep theirs, plus the shared vector. check_stop: called about every second; an exception
    from it ends the work and leaves the model as it is.
    """
    if config.embedding_init == "random":
        return
    generator = torch_generator(config.seed, STREAM)
    weight = model.output_weight
    information = mutual_information(count_neighbours(sample_ids(tokens), len(weight), check_stop))
    vectors = word_vectors(information, weight.shape[1], generator, check_stop)
    is_known = vectors.any(dim=1)
    weight[is_known.to(weight.device)] = vectors[is_known].to(weight)
    weight += (SHARED_RMS * torch.randn(weight.shape[1], generator=generator)).to(weight)


def mutual_information(counts: Tensor) -> Tensor:
    """Return the positive pointwise mutual information of words and their neighbours, in nats: sparse fp32 [V, V].

    counts: symmetric sparse [V, V], coalesced. SMOOTHING applies to the neighbour's share; the result is symmetric,
    because it is the mean over which word of a pair is the neighbour.
    """
    pairs, shares = counts.indices(), counts.values() / counts.values().sum(dtype=torch.float64).float()
    of_word = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, pairs[0], shares.double())
    smoothed = of_word**SMOOTHING / (of_word**SMOOTHING).sum()
    expected = ((of_word.log() + smoothed.log()) / 2).float()
    values = shares.log_().sub_(expected[pairs[0]]).sub_(expected[pairs[1]]).clamp_min_(0)
    return torch.sparse_coo_tensor(pairs, values, counts.shape, check_invariants=False, is_coalesced=True)


def word_vectors(
    information: Tensor, n_embed: int, generator: torch.Generator, check_stop: Callable[[], None] = never_stop
) -> Tensor:
    """Return a vector for each token: fp32 [V, D], with mean 0 and root mean square RMS. Zeros where nothing is known.

    information: symmetric sparse fp32 [V, V], coalesced. The vectors are approximate singular vectors of its D largest
    singular values, times the square roots of these values (Levy et al. 2015, Improving Distributional Similarity with
    Lessons Learned from Word Embeddings), rotated at random, so that all D numbers have equal size. generator: of the
    random numbers. check_stop: as for `start_from_neighbours`.
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
    # The signs of singular vectors depend on rounding, and so on the number of threads. The rotation that is closest to
    # fixed random numbers changes its signs with them, so their product does not (orthogonal Procrustes problem).
    u, _, vh = torch.linalg.svd(left.T @ torch.randn(V, n_embed, generator=generator), full_matrices=False)
    vectors = left * singular[:rank].sqrt() @ (u @ vh)
    is_known = torch.zeros(V).index_add_(0, information.indices()[0], information.values()) > 0
    if is_known.sum() < 2:  # a single vector is its own mean
        return torch.zeros_like(vectors)
    vectors = torch.where(is_known[:, None], vectors - vectors[is_known].mean(dim=0), 0.0)
    return vectors * (RMS / vectors[is_known].pow(2).mean().sqrt().clamp_min(LEAST_RMS))
