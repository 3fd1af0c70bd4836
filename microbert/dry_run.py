"""What a run would do -- corpus, tokens, model, steps, memory, disk, time -- told without training or writing anything."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from .batches import Batch, steps_in_run
from .config import Config, InputError, explain_learning_rate, peak_learning_rate
from .corpus import open_corpus
from .distributed import choose_device, describe_device
from .documents import HELD_OUT_AT_MOST, HELD_OUT_SHARE, Corpus
from .masking import mask_batch
from .memory import count_parameters, planned_peak_gb
from .model import ModelConfig, build_model
from .optim import build_optimizer
from .prepare import estimated_megabytes, find_tokens
from .run import BAD_INPUT, FAILED, Failed
from .tokenizer import N_SPECIAL, find_tokenizer
from .training import training_step

TIMED_STEPS, TIMED_SECONDS = 10, 5.0
PREPARED_MEGABYTES_A_SECOND = 10.0  # at least, on two cores
TOKENIZER_SECONDS = 10.0  # to train it


def tell_plan(config: Config) -> None:
    """Prints the plan; its last line is one JSON object. Ends the process with the code that a run would end with on bad input."""
    try:
        print(json.dumps(_plan(config)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from None


def _plan(config: Config) -> dict[str, object]:
    device = choose_device(config.device)
    corpus = open_corpus(config, lambda: None)
    tokenizer = find_tokenizer(corpus, config)
    tokens = find_tokens(corpus, tokenizer, config) if tokenizer else None
    vocab_size = tokenizer.get_vocab_size() if tokenizer else config.vocab_size
    if tokens:
        n_sequences, disk, preparation = len(tokens.train), 0.0, 0.0
        print(f"tokens: prepared already, {n_sequences:,} sequences to train on and {len(tokens.held_out):,} held out, in {tokens.folder}")
    else:
        n_sequences = _expected_sequences(corpus, config)
        estimate = corpus.estimate
        disk, preparation = estimated_megabytes(estimate.documents, estimate.megabytes, config), TOKENIZER_SECONDS + estimate.megabytes / PREPARED_MEGABYTES_A_SECOND
        print(f"tokens: to be prepared from {'' if estimate.is_exact else 'about '}{estimate.documents:,} documents, about {estimate.megabytes:,.0f} MB "
              f"of text; about {n_sequences:,} sequences to train on")
    model = ModelConfig(vocab_size, config.n_layers, config.n_heads, config.n_embed, config.max_seq_len, config.dropout)
    n_parameters = count_parameters(model)
    print(f"model: {config.n_layers} layers, {config.n_heads} heads, {config.n_embed}-dim, vocabulary {vocab_size:,}{'' if tokenizer else ' at most'}, "
          f"{n_parameters:,} parameters")
    steps = steps_in_run(n_sequences, config.epochs, config.batch_size)
    print(f"training: {'' if tokens else 'about '}{steps:,} steps of {config.batch_size} sequences on {describe_device(device)}, {config.epochs} epochs")
    print(explain_learning_rate(config))
    memory = planned_peak_gb(config, vocab_size, device)
    print(f"memory: about {memory:.2f} GB of {'the GPU' if device.type == 'cuda' else 'the machine'}")
    saved = 4 * n_parameters * (1 + 3 * (config.keep_checkpoints + 1)) / 1e6  # the model, and weights with Adam's moments in each checkpoint
    free = shutil.disk_usage(_existing(Path(config.output_dir))).free / 1e6
    print(f"disk: about {disk:,.0f} MB more in {config.cache_dir}, {saved:,.0f} MB in {config.output_dir} ({free / 1e3:,.0f} GB free)")
    seconds = _seconds_a_step(model, config, device)
    print(f"time: about {_in_words(seconds * steps)} of training ({seconds * 1000:.0f} ms a step, measured now on random tokens)"
          + (f", after {_in_words(preparation)} of preparation" if preparation else ""))
    return {"dataset": config.dataset, "n_layers": config.n_layers, "n_heads": config.n_heads, "n_embed": config.n_embed,
            "max_seq_len": config.max_seq_len, "vocab_size": vocab_size, "batch_size": config.batch_size,
            "micro_batch_size": min(config.micro_batch_size or config.batch_size, config.batch_size), "planned_peak_gb": round(memory, 3),
            "steps": steps, "peak_learning_rate": peak_learning_rate(config), "parameters": n_parameters, "sequences": n_sequences,
            "tokens_known": tokens is not None, "planned_seconds": round(seconds * steps, 1), "device": str(device)}


def _expected_sequences(corpus: Corpus, config: Config) -> int:
    estimate = corpus.estimate
    train_share = 1 - min(HELD_OUT_SHARE, HELD_OUT_AT_MOST / estimate.documents)
    bytes_a_token = 2 if config.vocab_size <= 2**16 else 4
    n_tokens = estimated_megabytes(estimate.documents, estimate.megabytes, config) * 1e6 / bytes_a_token
    return max(1, round(train_share * n_tokens / (config.max_seq_len - 2 if config.packing else config.max_seq_len)))


def _seconds_a_step(model_config: ModelConfig, config: Config, device: torch.device) -> float:
    """Of a training step on random tokens, the first one left out."""
    rng = np.random.default_rng(0)
    model = build_model(model_config, config.seed).to(device)
    optimizer = build_optimizer(model, config)
    shape = (config.batch_size, config.max_seq_len)
    seconds, begin = [], time.perf_counter()
    while len(seconds) <= TIMED_STEPS and (len(seconds) < 2 or time.perf_counter() - begin < TIMED_SECONDS):
        start = time.perf_counter()
        batch = Batch(rng.integers(N_SPECIAL, model_config.vocab_size, shape), np.arange(shape[0]), np.zeros(shape[0], np.int64), np.ones(shape[0], bool))
        masked = mask_batch(batch, seed=config.seed, probability=config.mlm_probability, vocab_size=model_config.vocab_size)
        training_step(model, optimizer, masked, config, len(seconds), learning_rate=0.0)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
