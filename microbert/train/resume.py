"""The point where the processes of a run meet: each has prepared its tokens, and from here on they act as one."""

import dataclasses
import hashlib
import socket
import time
from pathlib import Path
from typing import Any

import torch

from microbert.data.shards import Tokens
from microbert.errors import InputError
from microbert.model.layers import MaskedLanguageModel
from microbert.model.word_vectors import start_from_neighbours
from microbert.runtime.run import Run
from microbert.runtime.run_folder import checkpoint_folders
from microbert.train.checkpoint import State, load_checkpoint, remove_others
from microbert.train.optim import Optimizer

# constants that may differ between machines; instead, the tokens and the kind of device are compared
OF_THE_MACHINE = {"dataset", "output_dir", "cache_dir", "device"}


def resume_together(
    run: Run, checkpoint: Path | None, model: MaskedLanguageModel, optimizer: Optimizer, tokens: Tokens
) -> State:
    """Load the checkpoint into model and optimizer of every process, and return its state.

    The first process reads the checkpoint, so only its machine needs it, and removes those that the run does not need.
    Without a checkpoint, it sets the initial word embeddings, and the other processes get its weights.
    Raises InputError if a process has other constants or tokens than the first one, or a newer checkpoint; and what
    `load_checkpoint` raises.
    """
    world = run.world
    device = next(model.parameters()).device

    def begin() -> dict[str, Any]:
        if checkpoint is None:
            if run.config.embedding_init == "neighbours":
                print("word embeddings: starting from the words' neighbours in the training text ...")
            start_from_neighbours(model, tokens, run.config, run.check_stop)
            state = State(tokens.key, prepared_seconds=time.perf_counter() - run.started)
        else:
            state = load_checkpoint(checkpoint, model, optimizer, tokens.key)
            remove_others(checkpoint, run.config.keep_checkpoints)
        return {"state": dataclasses.asdict(state), "facts": _facts(run, device, tokens)}

    first = world.on_rank_0("start", begin, run.check_stop)
    _compare(run, first["facts"], _facts(run, device, tokens), first["state"]["step"])
    state = State(**first["state"])
    world.form_group(device, run.config.group_timeout, run.check_stop)
    world.broadcast(list(model.parameters()))
    if state.step:
        if not world.is_first:
            optimizer.begin_after(state.step)
        world.broadcast(list(optimizer.tensors().values()))
    if state.micro_batch_size != run.config.micro_batch_size:  # the user asked for another, or the plan has another
        state.micro_batch_size = None
    return state


def _facts(run: Run, device: torch.device, tokens: Tokens) -> dict[str, Any]:
    """Return what has to be the same in all processes."""
    constants = {name: value for name, value in dataclasses.asdict(run.config).items() if name not in OF_THE_MACHINE}
    contents = hashlib.sha256(tokens.token_counts.tobytes()).hexdigest()
    return {
        **constants,
        "device": device.type,
        "tokens": [tokens.key, len(tokens.train), len(tokens.held_out), contents],
    }


def _compare(run: Run, first: dict[str, Any], here: dict[str, Any], step: int) -> None:
    host = socket.gethostname()
    different = [
        f"{name} = {here[name]!r}, and the first process has {first[name]!r}"
        for name in here
        if name != "tokens" and here[name] != first[name]
    ]
    if different:
        raise InputError(f"on {host}: {'; '.join(different)}. Start every machine with the same constants")
    if here["tokens"] != first["tokens"]:
        raise InputError(
            f"on {host} the tokens are not those of the first process: the dataset, its files, the tokenizer or a "
            "library differs. Copy the same files to every machine, or share cache_dir between them"
        )
    newest = next((int(path.name[11:]) for path in checkpoint_folders(run.folder)), 0)
    if newest > step:
        raise InputError(
            f"on {host}, {run.folder} has checkpoint-{newest}, which is newer than what the first process has found "
            f"(step {step}). Use an output_dir that all machines share, or move that checkpoint to the machine of the "
            "first process"
        )
