"""What several benchmarks do: prepare text as a run does, train by hand, score on held-out sequences."""

import contextlib
import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from microbert.config.constants import Config  # noqa: E402
from microbert.data.batches import evaluation_batches, training_batch  # noqa: E402
from microbert.data.masking import EVALUATION_PROBABILITY, MaskedBatch, mask_batch  # noqa: E402
from microbert.data.prepare import prepare_tokens  # noqa: E402
from microbert.data.shards import Tokens  # noqa: E402
from microbert.data.sources import lock_cache, open_corpus  # noqa: E402
from microbert.data.tokenizer import get_tokenizer  # noqa: E402
from microbert.model.build import model_for_tokens  # noqa: E402
from microbert.model.layers import MaskedLanguageModel  # noqa: E402
from microbert.model.loss import masked_scores  # noqa: E402
from microbert.runtime.distributed import World  # noqa: E402
from microbert.train.step import Learner  # noqa: E402


def prepared(config: Config) -> tuple[Tokenizer, Tokens]:
    corpus = open_corpus(config, lambda: None)
    with lock_cache(corpus, config, lambda: None):
        tokenizer = get_tokenizer(corpus, config, lambda: None)
        return tokenizer, prepare_tokens(corpus, tokenizer, config, lambda: None)


def new_model(config: Config, tokens: Tokens) -> MaskedLanguageModel:
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its size each time
        return model_for_tokens(config, tokens)


def new_learner(config: Config, tokens: Tokens) -> Learner:
    return Learner(new_model(config, tokens), config, World.alone())


def take_step(learner: Learner, tokens: Tokens, number: int, learning_rate: float, epochs: int) -> None:
    """From rows of tokens to updated weights, and waits for it."""
    config = learner.config
    batch = training_batch(
        tokens.train, step=number, epochs=epochs, global_batch_size=config.batch_size, seed=config.seed
    )
    masked = mask_batch(
        batch, seed=config.seed, probability=config.mlm_probability, vocab_size=learner.model.config.vocab_size
    )
    learner.step(masked, number, learning_rate).read()


def scored_batches(config: Config, tokens: Tokens, n_batches: int) -> list[MaskedBatch]:
    """Of 32 held-out sequences each, masked as in a run's evaluation."""
    return [
        mask_batch(batch, seed=config.seed, probability=EVALUATION_PROBABILITY, vocab_size=len(tokens.token_counts))
        for batch, _ in zip(evaluation_batches(tokens.held_out, 32), range(n_batches))
    ]


@torch.no_grad()
def held_out_loss(learner: Learner, batches: list[MaskedBatch]) -> float:
    """In nats a masked token."""
    learner.model.eval()
    return sum(masked_scores(*learner.hidden(batch))[0] for batch in batches) / sum(batch.n_masked for batch in batches)
