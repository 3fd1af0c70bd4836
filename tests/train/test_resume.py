"""Processes begin with the same state, or report how they differ."""

import json
import shutil

import pytest
import torch
from configs import configure
from helpers import small_flags
from models import noisy_model
from safetensors.torch import load_file

from microbert.errors import InputError
from microbert.runtime.distributed import World
from microbert.runtime.run import Run
from microbert.train.checkpoint import find_checkpoint
from microbert.train.optim import Optimizer
from microbert.train.resume import resume_together


class Second(World):
    """The second of two processes. `said` turns its own answer into that of the first one."""

    def __init__(self, said):
        super().__init__({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"})
        self.said = said

    def on_rank_0(self, name, work, check_stop):
        return self.said(json.loads(json.dumps(work())))

    def form_group(self, device, timeout_seconds, check_stop):
        raise AssertionError("the group must not form")


@pytest.fixture
def prepared(finished_run, tmp_path):
    """Return the finished run's Config, its tokens, and a copy of its newest checkpoint in another folder."""
    from microbert.data.prepare import find_tokens
    from microbert.data.sources import open_corpus
    from microbert.data.tokenizer import find_tokenizer

    config = configure(*small_flags(finished_run, output_dir=tmp_path / "run"))
    corpus = open_corpus(config, lambda: None)
    tokens = find_tokens(corpus, find_tokenizer(corpus, config), config)
    newest = max((finished_run / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shutil.copytree(newest, tmp_path / "run" / newest.name)
    return config, tokens, tmp_path / "run" / newest.name


def begin(config, tokens, checkpoint, world):
    run = Run(config, checkpoint.parent, world)
    found = find_checkpoint(run, torch.device("cpu"))
    model = noisy_model(config.n_layers, config.n_heads, config.n_embed, config.max_seq_len, len(tokens.token_counts))
    return run, model, Optimizer(model, run.config), found


def test_a_single_process_loads_the_checkpoint(prepared):
    config, tokens, checkpoint = prepared
    run, model, optimizer, found = begin(*prepared, World.alone())
    state = resume_together(run, found, model, optimizer, tokens)
    assert state.step == int(checkpoint.name[11:]) and found == checkpoint
    stored = load_file(checkpoint / "optimizer.safetensors")
    moments = optimizer.tensors()
    assert moments.keys() == stored.keys() and all(torch.equal(moments[name], stored[name]) for name in stored)
    assert {float(of_one["step"]) for of_one in optimizer.members[0].state.values()} == {state.step}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda first: first["facts"].update(epochs=7), "epochs = 2, and the first process has 7"),
        (lambda first: first["facts"].update(eval_every=None), "eval_every = 20, and the first process has None"),
        (
            lambda first: first["facts"]["tokens"].__setitem__(0, "other"),
            "the tokens are not those of the first process",
        ),
        (
            lambda first: first["facts"]["tokens"].__setitem__(3, "other"),
            "the tokens are not those of the first process",
        ),
        (lambda first: first["state"].update(step=5), "is newer than what the first process has found (step 5)"),
    ],
)
def test_a_process_that_differs_reports_how(change, message, prepared):
    config, tokens, checkpoint = prepared
    run, model, optimizer, found = begin(*prepared, World.alone())

    def said(first):
        change(first)
        return first

    run.world = Second(said)
    with pytest.raises(InputError) as caught:
        resume_together(run, found, model, optimizer, tokens)
    assert message in str(caught.value)


def test_constants_of_a_machine_are_not_compared(prepared):
    config, tokens, checkpoint = prepared
    run, model, optimizer, found = begin(*prepared, World.alone())
    facts = {}
    run.world = Second(lambda first: facts.update(first["facts"]) or first)
    with pytest.raises(AssertionError, match="group"):  # reached after all comparisons
        resume_together(run, found, model, optimizer, tokens)
    assert not {"dataset", "output_dir", "cache_dir"} & set(facts)
    assert facts["device"] == "cpu" and facts["seed"] == config.seed
