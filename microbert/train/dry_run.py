"""The plan of a run -- tokens, model, steps, memory, disk, time -- without training or writing anything."""

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from microbert.config.constants import Config, ResolvedConfig, fill_in, resolve_batch_size, tokens_per_step
from microbert.config.environment import hub_folder
from microbert.config.learning_rate import explain_learning_rate, peak_learning_rate
from microbert.config.terminal import counted
from microbert.data.batches import random_batch, steps_in_run
from microbert.data.corpus import HELD_OUT_AT_MOST, HELD_OUT_SHARE, Estimate
from microbert.data.hub import choose_dataset
from microbert.data.masking import mask_batch
from microbert.data.prepare import estimated_megabytes, estimated_tokens, find_tokens
from microbert.data.row_lengths import (
    TEXT_OF_ROW,
    TEXT_SHARE,
    describe_step,
    row_lengths,
    rows_of_process,
    usual_shares,
)
from microbert.data.sources import open_corpus
from microbert.data.tokenizer import find_tokenizer
from microbert.data.training_rows import training_rows
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
from microbert.train.hardware import GB, Hardware, hardware_of
from microbert.train.memory import Plan, describe_memory_plan, describe_tier, resolve_memory_plan
from microbert.train.progress import duration
from microbert.train.step import Learner

TIMED_STEPS, TIMED_SECONDS = 10, 5.0
PREPARED_MB_PER_SECOND = 25.0  # on two cores
TOKENIZER_SECONDS = 10.0  # to train it


@dataclasses.dataclass(frozen=True)
class _Machine:
    """device: None if it is not at hand. description: for the user."""

    hardware: Hardware
    device: torch.device | None
    description: str


@dataclasses.dataclass(frozen=True)
class _Text:
    """tokens_key: None if the tokens are not prepared yet. Then megabytes and seconds are what preparing them needs.

    steps: of the run by row length. vocab_size: at most, without a tokenizer.
    """

    tokens_key: str | None
    n_sequences: int
    steps: dict[int, int]
    vocab_size: int
    has_tokenizer: bool
    megabytes: float
    seconds: float
    description: str


def print_plan(config: Config, estimate: Estimate | None = None, with_json: bool = True) -> None:
    """Print the plan; its last line is one JSON object, for programs. Exit as a run does on bad input.

    estimate: of a dataset that is not at hand, instead of the constant's. Under torchrun, the first process prints.
    """
    world = World()
    if not world.is_first:
        return
    if config.num_gpus is not None:
        world = World({"WORLD_SIZE": str(config.num_gpus), "LOCAL_WORLD_SIZE": str(config.num_gpus)})
    with plain_errors():
        facts = _plan(config, world, estimate)
        if with_json:
            print(json.dumps(facts))


def _plan(config: Config, world: World, estimate: Estimate | None) -> dict[str, object]:
    """Print the plan for people, and return the one for programs."""
    folder = Path(config.output_dir)
    check_folder(folder)
    machine = _machine(config, world)
    hardware = machine.hardware
    if config.gpu_memory_gb is not None:  # the size that a GPU is sold under, in GB, is a little less than that in GiB
        budget = min(config.memory_budget_gb or math.inf, config.gpu_memory_gb)
        config = dataclasses.replace(config, memory_budget_gb=budget)
    checkpoint = None
    if config.overwrite and folder.exists():
        print(f"--overwrite: removes the earlier run in {folder}")
        given = fill_in(config, hardware.tier().values())
        resolved = resolve_batch_size(given, world.size)
    elif holds_model(folder):
        return _finished_plan(*compare_with_finished(folder, config, hardware), folder, hardware)
    else:
        checkpoint, given, resolved = look_for_checkpoint(folder, config, hardware)
    if config.preset is not None:
        print(describe_tier(given, hardware))
    text = _text(resolved, estimate)
    print(text.description)
    model = shape_of(resolved, text.vocab_size)
    print(_describe_model(model, text))
    steps = sum(text.steps.values())
    steps_done = read_state(checkpoint, text.tokens_key).step if checkpoint else 0
    remaining = max(0, steps - steps_done)  # an estimate of the steps may be too low
    about = "" if text.tokens_key else "about "
    if config.prepare_only:
        print("--prepare-only: stops when the tokens are prepared; the rest of this plan is for a run without it")
    print(
        f"training: {about}{steps:,} steps of {describe_step(resolved)} on {machine.description}, "
        f"{counted(config.epochs, 'epoch')}"
    )
    if checkpoint:
        print(f"resuming after step {steps_done}: {about}{remaining:,} steps remain, from {checkpoint}")
    print(explain_learning_rate(resolved))
    memory = resolve_memory_plan(given, resolved, text.vocab_size, hardware)
    print(describe_memory_plan(memory, resolved, hardware))
    print(_describe_disk(resolved, text.megabytes, _saved_megabytes(model, config.keep_checkpoints)))
    resolved = dataclasses.replace(resolved, micro_batch_size=memory.micro_batch_size)
    return _facts(resolved, model, memory, hardware, steps, steps_done) | {
        "sequences": text.n_sequences,
        "tokens_known": text.tokens_key is not None,
        "planned_seconds": _planned_seconds(resolved, model, machine, remaining, text),
    }


def _machine(config: Config, world: World) -> _Machine:
    if config.gpu_memory_gb is None:
        device = choose_device(config.device, World.alone() if config.num_gpus is not None else world)
        return _Machine(hardware_of(device, world), device, describe_device(device, world))
    # assume an Ampere GPU or later; its tier depends on the size that it is sold under
    hardware = Hardware("cuda", round(config.gpu_memory_gb * GIB), world.size, has_bf16=True)
    gpus = f"{counted(world.size, 'GPU')} of {config.gpu_memory_gb:g} GB"
    return _Machine(hardware, None, f"{gpus} (not at hand)")


def _text(config: ResolvedConfig, estimate: Estimate | None) -> _Text:
    """Find the prepared tokens, or estimate them."""
    tokenizer = tokens = None
    if estimate is None:
        corpus = open_corpus(config)
        print(corpus.summary)
        estimate, tokenizer = corpus.estimate, find_tokenizer(corpus, config)
        tokens = find_tokens(corpus, tokenizer, config) if tokenizer else None
    vocab_size = tokenizer.get_vocab_size() if tokenizer else config.vocab_size
    noun = "rows" if config.rows == "documents" else "sequences"
    if tokens:
        n_sequences, steps = len(tokens.train), training_rows(tokens, config).steps_of_lengths()
        description = (
            f"tokens: prepared already, {n_sequences:,} {noun} to train on and {len(tokens.held_out):,} sequences held "
            f"out, in {tokens.folder}"
        )
        return _Text(tokens.key, n_sequences, steps, vocab_size, True, 0.0, 0.0, description)
    n_sequences, steps = _expected_rows(estimate, config)
    description = (
        f"tokens: to be prepared from {'' if estimate.is_exact else 'about '}{estimate.documents:,} documents, about "
        f"{estimate.megabytes:,.0f} MB of text; about {n_sequences:,} {noun} to train on"
    )
    seconds = TOKENIZER_SECONDS + estimate.megabytes / PREPARED_MB_PER_SECOND
    megabytes = estimated_megabytes(estimate, config)
    return _Text(None, n_sequences, steps, vocab_size, tokenizer is not None, megabytes, seconds, description)


def _expected_rows(estimate: Estimate, config: ResolvedConfig) -> tuple[int, dict[int, int]]:
    """Return the expected rows of an epoch, and the expected steps of the run by row length."""
    train_share = 1 - min(HELD_OUT_SHARE, HELD_OUT_AT_MOST / estimate.documents)
    n_tokens = train_share * estimated_tokens(estimate, config)
    if config.rows == "documents":
        lengths = row_lengths(config)
        steps = np.array(usual_shares(lengths)) * config.epochs * n_tokens / TEXT_SHARE / tokens_per_step(config)
        return max(1, round(n_tokens / TEXT_OF_ROW)), dict(
            zip(lengths, np.ceil(steps).astype(int).tolist(), strict=True)
        )
    n_sequences = max(1, round(n_tokens / (config.max_seq_len - 2 if config.packing else config.max_seq_len)))
    return n_sequences, {config.max_seq_len: steps_in_run(n_sequences, config.epochs, config.global_batch_size)}


def _planned_seconds(
    config: ResolvedConfig, model: ModelConfig, machine: _Machine, steps: int, text: _Text
) -> float | None:
    """Print and return the seconds of training; None if the device is not at hand. steps: those that remain."""
    if machine.device is None:
        print("time: unknown, because it is measured on the machine itself")
        return None
    seconds = round(_seconds_per_step(model, config, machine.device, text.steps) * steps, 1)
    before = f"{duration(text.seconds)} of preparation and " if text.seconds else ""
    print(
        f"time: about {duration(text.seconds + seconds)}: {before}{duration(seconds)} of training "
        f"({steps:,} steps, timed now on random tokens)"
    )
    if config.max_minutes is not None and seconds > 60 * config.max_minutes:
        print(f"max_minutes = {config.max_minutes:g}: the run ends sooner, and its learning-rate schedule with it")
        return 60 * config.max_minutes
    return seconds


def _seconds_per_step(
    model_config: ModelConfig, config: ResolvedConfig, device: torch.device, steps: dict[int, int]
) -> float:
    """Time training steps on random tokens, without those that compile and capture. steps: by row length."""
    learner = Learner(build_model(model_config, config.seed).to(device), config, World.alone())
    n_left_out = WARM_UP + 1 if is_captured(config, device) else 1
    medians = []
    for length in steps:
        seconds: list[float] = []
        while len(seconds) < n_left_out + TIMED_STEPS and sum(seconds[n_left_out:]) < TIMED_SECONDS / len(steps):
            start = time.perf_counter()
            batch = random_batch(len(seconds), model_config.vocab_size, rows_of_process(config)[length], length)
            masked = mask_batch(
                batch, seed=config.seed, probability=config.mlm_probability, vocab_size=model_config.vocab_size
            )
            learner.step(masked, len(seconds), 0.0).read()
            seconds.append(time.perf_counter() - start)
        medians.append(float(np.median(seconds[n_left_out:])))
    return float(np.average(medians, weights=list(steps.values())))


def _finished_plan(given: Config, config: ResolvedConfig, folder: Path, hardware: Hardware) -> dict[str, object]:
    """Return the plan of a finished run, in which nothing remains to be done."""
    print(
        f"{folder} is finished: nothing remains to be done; --overwrite starts again, another --output-dir keeps both"
    )
    try:
        vocab_size = read_hugging_face_config(read_json(folder / "config.json")).vocab_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        if system_trouble(error):
            raise
        raise InputError(f"{folder / 'config.json'} is damaged ({error}): --overwrite starts again") from error
    steps = max((int(line["step"]) for line in read_metrics(folder / "metrics.jsonl")), default=0)
    memory = resolve_memory_plan(given, config, vocab_size, hardware)
    return _facts(config, shape_of(config, vocab_size), memory, hardware, steps, steps) | {"planned_seconds": 0.0}


def _facts(
    config: ResolvedConfig, model: ModelConfig, memory: Plan, hardware: Hardware, steps: int, steps_done: int
) -> dict[str, object]:
    """Return the plan for programs. steps: of the whole run. steps_done: before this start."""
    shape = ("n_layers", "n_heads", "n_embed", "vocab_size")
    return {
        "dataset": config.dataset,
        **{name: getattr(model, name) for name in shape},
        "max_seq_len": config.max_seq_len,
        "batch_size": config.batch_size,
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": memory.micro_batch_size,
        "planned_peak_gb": round(memory.total / GB, 3),
        "memory_budget_gb": memory.budget and round(memory.budget / GB, 3),
        "steps": steps,
        "steps_done": steps_done,
        "peak_learning_rate": peak_learning_rate(config),
        "parameters": count_parameters(model),
        "device": hardware.kind,
    }


def _describe_model(model: ModelConfig, text: _Text) -> str:
    limit = "" if text.has_tokenizer else "at most "
    return (
        f"model: {counted(model.n_layers, 'layer')}, {counted(model.n_heads, 'head')}, "
        f"{model.n_embed}-dim, vocabulary of {limit}{model.vocab_size:,}, {count_parameters(model):,} parameters"
    )


def _saved_megabytes(model: ModelConfig, keep_checkpoints: int) -> float:
    """Return the size of the model, and of the checkpoints with weights and two moments; one is being written."""
    return 4 * count_parameters(model) * (1 + 3 * (keep_checkpoints + 1)) / 1e6


def _describe_disk(config: Config, tokens: float, saved: float) -> str:
    """Return what the disks have to hold, with a warning if it is more than they have.

    tokens, saved: what cache_dir and output_dir will need, in MB.
    """
    cache, output = _existing(Path(config.cache_dir)), _existing(Path(config.output_dir))
    free = {folder: shutil.disk_usage(folder).free / 1e6 for folder in (cache, output)}
    of_cache = f"nothing more in {config.cache_dir}"
    if tokens:
        of_cache = f"about {tokens:,.0f} MB in {config.cache_dir}, and twice that during preparation"
    lines = [
        f"disk: {of_cache} ({free[cache] / 1e3:,.0f} GB free); "
        f"{saved:,.0f} MB in {config.output_dir} ({free[output] / 1e3:,.0f} GB free)"
    ]
    if tokens and (hub := hub_folder(config)) and not choose_dataset(config)[2]:
        free_gb = shutil.disk_usage(_existing(hub)).free / 1e9
        lines.append(f"disk: unless it is there already, the dataset is downloaded to {hub} ({free_gb:,.0f} GB free)")
    is_one_disk = cache.stat().st_dev == output.stat().st_dev
    if 2 * tokens + saved * is_one_disk > free[cache] or saved + 2 * tokens * is_one_disk > free[output]:
        lines.append(
            "warning: the disk may be too small for that; reduce max_samples, or choose another cache_dir or output_dir"
        )
    return "\n".join(lines)


def _existing(path: Path) -> Path:
    """Return the path, or the closest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
