"""What a run would do -- corpus, tokens, model, steps, memory, disk, time -- told without training or writing anything."""

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from microbert.config.constants import Config, fill_in, resolve_batch_size
from microbert.config.environment import hub_folder
from microbert.config.learning_rate import explain_learning_rate, peak_learning_rate
from microbert.data.batches import random_batch, steps_in_run
from microbert.data.corpus import HELD_OUT_AT_MOST, HELD_OUT_SHARE, Estimate
from microbert.data.hub import choose_dataset
from microbert.data.masking import mask_batch
from microbert.data.prepare import estimated_megabytes, estimated_tokens, find_tokens
from microbert.data.sources import open_corpus
from microbert.data.tokenizer import find_tokenizer
from microbert.errors import InputError
from microbert.model.build import build_model, count_parameters, shape_of
from microbert.model.hugging_face import read_hugging_face_config
from microbert.model.layers import ModelConfig
from microbert.runtime.cuda_graph import WARM_UP
from microbert.runtime.device import GIB, choose_device, describe_device, is_captured
from microbert.runtime.distributed import World
from microbert.runtime.files import read_json, system_trouble
from microbert.runtime.metrics import read_metrics
from microbert.runtime.outcome import plain_errors
from microbert.runtime.run_folder import check_folder, holds_model
from microbert.train.checkpoint import compare_with_finished, look_for_checkpoint, read_state
from microbert.train.memory import GB, Hardware, Plan, hardware_of, print_memory_plan, print_tier, resolve_memory_plan
from microbert.train.step import Learner

TIMED_STEPS, TIMED_SECONDS = 10, 5.0
PREPARED_MEGABYTES_A_SECOND = 25.0  # on two cores
TOKENIZER_SECONDS = 10.0  # to train it


def print_plan(config: Config, estimate: Estimate | None = None, with_json: bool = True) -> None:
    """Prints the plan; its last line is one JSON object. Ends the process with the code that a run would end with on bad input.

    Under torchrun the first process does, for all of them. estimate: of a dataset that is not at hand, instead of the constant's.
    """
    world = World()
    if not world.is_first:
        return
    if config.num_gpus is not None:
        world = World({"WORLD_SIZE": str(config.num_gpus), "LOCAL_WORLD_SIZE": str(config.num_gpus)})
    with plain_errors():
        facts = _plan(config, world, estimate)
        if with_json:  # for programs
            print(json.dumps(facts))


def _plan(config: Config, world: World, estimate: Estimate | None) -> dict[str, object]:
    folder = Path(config.output_dir)
    check_folder(folder)
    is_at_hand = config.gpu_memory_gb is None
    if is_at_hand:
        device = choose_device(config.device, World.alone() if config.num_gpus is not None else world)
        hardware, described = hardware_of(device, world), describe_device(device, world)
    else:
        # taken for one from Ampere on; its tier goes by the size that it is sold under, its budget by that in GB, which is a little less
        device, hardware = (
            torch.device("cuda"),
            Hardware("cuda", round(config.gpu_memory_gb * GIB), world.size, has_bf16=True),
        )
        config = dataclasses.replace(
            config, memory_budget_gb=min(config.memory_budget_gb or math.inf, config.gpu_memory_gb)
        )
        described = f"{world.size} GPU{'s' * (world.size > 1)} of {config.gpu_memory_gb:g} GB (not at hand)"
    checkpoint = None
    if config.overwrite and folder.exists():
        print(f"--overwrite: an earlier run in {folder} would be removed first")
        given = fill_in(config, hardware.tier().values())
        config = resolve_batch_size(given, world.size)
    elif holds_model(folder):
        return _finished_plan(*compare_with_finished(folder, config, hardware), folder, hardware)
    else:
        checkpoint, given, config = look_for_checkpoint(folder, config, hardware)
    if config.preset is not None:
        print_tier(given, hardware)
    tokenizer = tokens = None
    if estimate is None:
        corpus = open_corpus(config)
        print(corpus.summary)
        estimate, tokenizer = corpus.estimate, find_tokenizer(corpus, config)
        tokens = find_tokens(corpus, tokenizer, config) if tokenizer else None
    vocab_size = tokenizer.get_vocab_size() if tokenizer else config.vocab_size
    if tokens:
        n_sequences, disk, preparation = len(tokens.train), 0.0, 0.0
        print(
            f"tokens: prepared already, {n_sequences:,} sequences to train on and {len(tokens.held_out):,} held out, in {tokens.folder}"
        )
    else:
        n_sequences = _expected_sequences(estimate, config)
        disk, preparation = (
            estimated_megabytes(estimate, config),
            TOKENIZER_SECONDS + estimate.megabytes / PREPARED_MEGABYTES_A_SECOND,
        )
        print(
            f"tokens: to be prepared from {'' if estimate.is_exact else 'about '}{estimate.documents:,} documents, about {estimate.megabytes:,.0f} MB "
            f"of text; about {n_sequences:,} sequences to train on"
        )
    model = shape_of(config, vocab_size)
    n_parameters = count_parameters(model)
    print(
        f"model: {config.n_layers} layers, {config.n_heads} heads, {config.n_embed}-dim, vocabulary {vocab_size:,}{'' if tokenizer else ' at most'}, "
        f"{n_parameters:,} parameters"
    )
    steps = steps_in_run(n_sequences, config.epochs, config.global_batch_size)
    steps_done = read_state(checkpoint, tokens.key if tokens else None).step if checkpoint else 0
    remaining = max(0, steps - steps_done)  # below 0 only where the steps are an estimate
    if config.prepare_only:
        print(
            "--prepare-only: the run would stop when the tokens are prepared; what follows is the same command without it"
        )
    print(
        f"training: {'' if tokens else 'about '}{steps:,} steps of {config.global_batch_size} sequences on {described}, {config.epochs} epochs"
    )
    if checkpoint:
        print(
            f"going on after step {steps_done}: {'' if tokens else 'about '}{remaining:,} steps remain, from {checkpoint}"
        )
    print(explain_learning_rate(config))
    memory = resolve_memory_plan(given, config, vocab_size, hardware)
    print_memory_plan(memory, config, hardware)
    saved = (
        4 * n_parameters * (1 + 3 * (config.keep_checkpoints + 1)) / 1e6
    )  # the model, and weights with two moments in each checkpoint
    _print_disk(config, disk, saved)
    seconds = None
    if is_at_hand:
        seconds = round(
            _seconds_a_step(model, dataclasses.replace(config, micro_batch_size=memory.micro_batch_size), device)
            * remaining,
            1,
        )
        print(
            f"time: about {_in_words(seconds)} of training ({remaining:,} steps, one measured now on random tokens)"
            + (f", after {_in_words(preparation)} of preparation" if preparation else "")
        )
        if config.max_minutes is not None and seconds > 60 * config.max_minutes:
            seconds = 60 * config.max_minutes
            print(f"max_minutes = {config.max_minutes:g}: the run ends sooner, with its learning rate in time")
    else:
        print("time: not known, for it is measured on the machine itself")
    return _facts(config, vocab_size, memory, hardware, steps, steps_done, n_parameters) | {
        "sequences": n_sequences,
        "tokens_known": tokens is not None,
        "planned_seconds": seconds,
    }


def _finished_plan(given: Config, config: Config, folder: Path, hardware: Hardware) -> dict[str, object]:
    """The plan of a finished run, for which nothing is left to do."""
    print(f"{folder} is finished: nothing would be done; --overwrite starts anew, another --output-dir keeps both")
    try:
        vocab_size = read_hugging_face_config(read_json(folder / "config.json")).vocab_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        if system_trouble(error):
            raise
        raise InputError(f"{folder / 'config.json'} is damaged ({error}): --overwrite starts anew") from error
    steps = max((line["step"] for line in read_metrics(folder / "metrics.jsonl")), default=0)
    n_parameters = count_parameters(shape_of(config, vocab_size))
    memory = resolve_memory_plan(given, config, vocab_size, hardware)
    return _facts(config, vocab_size, memory, hardware, steps, steps, n_parameters) | {"planned_seconds": 0.0}


def _facts(
    config: Config, vocab_size: int, memory: Plan, hardware: Hardware, steps: int, steps_done: int, n_parameters: int
) -> dict[str, object]:
    """steps: of the whole run. steps_done: of them, before this start."""
    return {
        "dataset": config.dataset,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_embed": config.n_embed,
        "max_seq_len": config.max_seq_len,
        "vocab_size": vocab_size,
        "batch_size": config.batch_size,
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": memory.micro_batch_size,
        "planned_peak_gb": round(memory.total / GB, 3),
        "memory_budget_gb": memory.budget and round(memory.budget / GB, 3),
        "steps": steps,
        "steps_done": steps_done,
        "peak_learning_rate": peak_learning_rate(config),
        "parameters": n_parameters,
        "device": hardware.kind,
    }


def _print_disk(config: Config, tokens: float, saved: float) -> None:
    """tokens, saved: what cache_dir and output_dir will hold more, in MB. Warns where a disk has less than both need together."""
    cache, output = _existing(Path(config.cache_dir)), _existing(Path(config.output_dir))
    free = {folder: shutil.disk_usage(folder).free / 1e6 for folder in (cache, output)}
    meanwhile = (
        f"about {tokens:,.0f} MB more in {config.cache_dir}, and twice that meanwhile"
        if tokens
        else f"nothing more in {config.cache_dir}"
    )
    print(
        f"disk: {meanwhile} ({free[cache] / 1e3:,.0f} GB free); {saved:,.0f} MB in {config.output_dir} ({free[output] / 1e3:,.0f} GB free)"
    )
    if tokens and (hub := hub_folder(config)) and not choose_dataset(config)[2]:
        print(
            f"disk: datasets downloads the dataset to {hub} ({shutil.disk_usage(_existing(hub)).free / 1e9:,.0f} GB free), where it is not there yet"
        )
    one_disk = cache.stat().st_dev == output.stat().st_dev
    if 2 * tokens + saved * one_disk > free[cache] or saved + 2 * tokens * one_disk > free[output]:
        print(
            "warning: the disk may be too small for that; a smaller max_samples takes less, another cache_dir or output_dir may have more"
        )


def _expected_sequences(estimate: Estimate, config: Config) -> int:
    train_share = 1 - min(HELD_OUT_SHARE, HELD_OUT_AT_MOST / estimate.documents)
    tokens_a_sequence = config.max_seq_len - 2 if config.packing else config.max_seq_len
    return max(1, round(train_share * estimated_tokens(estimate, config) / tokens_a_sequence))


def _seconds_a_step(model_config: ModelConfig, config: Config, device: torch.device) -> float:
    """Of a training step on random tokens, without those that compile and record."""
    learner = Learner(build_model(model_config, config.seed).to(device), config, World.alone())
    n_left_out, seconds = WARM_UP + 1 if is_captured(config, device) else 1, []
    while len(seconds) < n_left_out + TIMED_STEPS and sum(seconds[n_left_out:]) < TIMED_SECONDS:
        start = time.perf_counter()
        batch = random_batch(len(seconds), model_config.vocab_size, config.batch_size, config.max_seq_len)
        masked = mask_batch(
            batch, seed=config.seed, probability=config.mlm_probability, vocab_size=model_config.vocab_size
        )
        learner.step(masked, len(seconds), 0.0).read()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[n_left_out:]))


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _in_words(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
