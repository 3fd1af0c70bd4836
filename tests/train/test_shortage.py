"""Running out of memory in the update or in evaluation: all processes use less and repeat the work; nothing is lost."""

import concurrent.futures
import os
import types

import numpy as np
import pytest
import torch
from configs import configure
from helpers import TIME_LIMIT
from launches import free_port
from models import as_batch, as_sequences, noisy_model, token_rows
from test_step import NO_MEMORY, VOCAB_SIZE

import microbert.runtime.cuda_graph
import microbert.train.gradients
import microbert.train.held_out
import microbert.train.optim
import microbert.train.step
from microbert.data.masking import mask_batch
from microbert.errors import Failed
from microbert.runtime.distributed import World
from microbert.train.held_out import evaluate
from microbert.train.step import Learner

RECIPE = {"arch": "modern", "optimizer": "muon"}
STEPS = 4


def new_learner(world=None, **constants):
    config = configure(batch_size=8, **RECIPE, **constants)
    return Learner(noisy_model(arch=config.arch), config, world or World.alone())


def take_steps(learner, numbers=range(STEPS)):
    """Take steps of eight sequences, of which this process has its share. Return their numbers."""
    world, read = learner.world, []
    for number in numbers:
        rows = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
        batch = as_batch(token_rows(8, seed=number)[rows], sequence_ids=np.arange(8)[rows])
        masked = mask_batch(batch, seed=number, probability=0.3, vocab_size=VOCAB_SIZE)
        read.append(learner.step(masked, number, 1e-2).read())
    return read


def run_of(learner):
    """Return what `evaluate` needs of a run."""
    return types.SimpleNamespace(world=learner.world, stop_signal=None, config=learner.config)


def held_out():
    return as_sequences(token_rows(21, seed=9))


def state_of(learner):
    return [*learner.model.parameters(), *learner.optimizer.tensors().values()]


def same(learner, other):
    return all(torch.equal(*pair) for pair in zip(state_of(learner), state_of(other), strict=True))


def out_of_memory_at(patch, target, name, calls):
    """Make these calls, counted from 1, run out of memory before they do anything."""
    real, count = getattr(target, name), [0]

    def short(*arguments, **options):
        count[0] += 1
        if count[0] in calls:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return real(*arguments, **options)

    patch.setattr(target, name, short)


N_MATRICES = len(microbert.train.optim.parameter_groups(noisy_model(arch="modern"), "muon")[microbert.train.optim.MUON])
# calls in the second step; it calls orthogonalise for each of two shapes of matrices, and lerp twice for each matrix
PLACES = [
    (microbert.train.gradients, "get_total_norm", {2}),
    (torch, "_foreach_mul_", {2}),
    (microbert.train.optim, "orthogonalise", {3}),
    (microbert.train.optim, "orthogonalise", {4}),
    (microbert.train.optim.FusedAdamW, "step", {2}),
    (microbert.train.optim.Muon, "prepare", {2}),
    (torch.Tensor, "lerp", {2 * N_MATRICES + 7}),
]


@pytest.mark.fault(row=26)
@pytest.mark.parametrize("target, name, calls", PLACES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_update_that_runs_out_of_memory_is_repeated_with_the_same_result(target, name, calls, monkeypatch, capsys):
    expected, learner = new_learner(), new_learner()
    numbers = take_steps(expected, range(2))
    expected.sizes.micro_batch = 4  # in the steps after the shortage
    numbers += take_steps(expected, range(2, STEPS))
    out_of_memory_at(monkeypatch, target, name, calls)
    assert take_steps(learner) == numbers and same(learner, expected)
    assert (learner.sizes.micro_batch, learner.sizes.evaluation, learner.sizes.ran_short) == (4, 4, True)
    message = capsys.readouterr().err
    assert (
        message.count("out of memory") == 2
        and "step 1: out of memory in the update with 8 sequences" in message
        and "2.00 GiB" in message
    )


@pytest.mark.parametrize("n_calls", range(1, 12))
def test_creating_the_moments_is_repeated_after_running_out_of_memory(n_calls, monkeypatch):
    expected, learner = new_learner(), new_learner()
    take_steps(expected, range(1))
    out_of_memory_at(monkeypatch, torch, "zeros_like", {n_calls})
    take_steps(learner, range(1))
    assert same(learner, expected)


def test_an_update_that_never_fits_ends_the_run_and_changes_nothing(monkeypatch):
    learner = new_learner()
    take_steps(learner, range(1))
    before = [tensor.clone() for tensor in state_of(learner)]
    out_of_memory_at(monkeypatch, microbert.train.optim, "orthogonalise", range(1, 100))
    with pytest.raises(Failed, match=r"step 1: out of memory in the update with one sequence of 128 tokens .*2.00 GiB"):
        take_steps(learner, range(1, 2))
    assert learner.sizes.micro_batch == 1
    assert all(torch.equal(*pair) for pair in zip(before, state_of(learner), strict=True))


def test_cuda_graphs_are_dropped_after_running_out_of_memory(monkeypatch):
    monkeypatch.setattr(microbert.train.step, "is_captured", lambda *_: True)
    monkeypatch.setattr(microbert.runtime.cuda_graph, "capture", lambda function, _: function)
    learners = [new_learner() for _ in range(2)]
    for learner in learners:
        take_steps(learner)
        assert learner._backward.has_graph and learner._update.has_graph
    out_of_memory_at(monkeypatch, microbert.train.held_out, "masked_scores", {2})
    evaluate(learners[0], held_out(), run_of(learners[0]))
    out_of_memory_at(monkeypatch, microbert.train.optim, "orthogonalise", {2})
    take_steps(learners[1], range(4, 6))
    for learner in learners:
        assert learner.sizes.ran_short and not learner._backward.has_graph and not learner._update.has_graph


@pytest.mark.fault(row=26)
def test_an_evaluation_that_runs_out_of_memory_is_repeated_in_smaller_batches(monkeypatch, capsys):
    learner, expected = new_learner(), new_learner()
    expected.sizes.evaluation = 2
    wanted, _ = evaluate(expected, held_out(), run_of(expected))
    whole, _ = evaluate(learner, held_out(), run_of(learner))
    real = microbert.train.held_out.masked_scores
    capacity = [25]  # masked slots: of three sequences at most

    def masked_scores(hidden, *others):
        if len(hidden) > capacity[0]:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return real(hidden, *others)

    monkeypatch.setattr(microbert.train.held_out, "masked_scores", masked_scores)
    capacity[0] = 2 * len(
        mask_batch(as_batch(token_rows(1)), seed=0, probability=0.15, vocab_size=VOCAB_SIZE).labels[0]
    )
    found, stopping = evaluate(learner, held_out(), run_of(learner))
    assert (found.loss, found.accuracy, stopping) == (
        wanted.loss,
        wanted.accuracy,
        [],
    )  # the masks belong to the sequences
    assert found.loss == pytest.approx(whole.loss, rel=1e-6) and found.accuracy == whole.accuracy
    assert (learner.sizes.micro_batch, learner.sizes.evaluation, learner.sizes.ran_short) == (8, 2, True)
    message = capsys.readouterr().err
    assert (
        "out of memory in evaluation with 8 sequences" in message
        and "out of memory in evaluation with 4 sequences" in message
    )
    capacity[0] = 0
    with pytest.raises(Failed, match="out of memory in evaluation with one sequence"):
        evaluate(learner, held_out(), run_of(learner))


def learn(rank, port, short_in, sizes):
    """Take four steps and evaluate twice, as one of two processes. Return all results.

    The second process runs out of memory in the second update, or in evaluation, with more than one sequence.
    short_in: "update", "evaluation" or "". sizes: to set after two steps, of micro-batches and of evaluation.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = World({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    world.meet()
    world.form_group(torch.device("cpu"), 60)
    learner = new_learner(world, micro_batch_size=4)
    real_orthogonalise, real_scores = microbert.train.optim.orthogonalise, microbert.train.held_out.masked_scores

    def orthogonalise(*arguments):
        if short_in == "update" and rank == 1 and learner.sizes.step == 1 and learner.sizes.micro_batch > 1:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return real_orthogonalise(*arguments)

    def masked_scores(*arguments):
        if short_in == "evaluation" and rank == 1 and learner.sizes.evaluation > 1:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return real_scores(*arguments)

    microbert.train.optim.orthogonalise, microbert.train.held_out.masked_scores = orthogonalise, masked_scores
    numbers = take_steps(learner, range(2))
    if sizes is not None:
        learner.sizes.micro_batch, learner.sizes.evaluation = sizes
    between, _ = evaluate(learner, held_out(), run_of(learner))
    numbers += take_steps(learner, range(2, STEPS))
    after, _ = evaluate(learner, held_out(), run_of(learner))
    world.gather(0.0)  # the first process holds the store
    world.leave_group()
    losses = [between.loss, after.loss, between.accuracy, after.accuracy]
    return (
        numbers,
        losses,
        [tensor.detach().numpy().copy() for tensor in state_of(learner)],
        (learner.sizes.micro_batch, learner.sizes.evaluation),
    )


@pytest.mark.slow
@pytest.mark.fault(row=26)
@pytest.mark.parametrize("short_in, sizes", [("update", (1, 1)), ("evaluation", (4, 1))])
def test_two_processes_agree_on_smaller_batches_and_get_the_same_weights(short_in, sizes):
    with concurrent.futures.ProcessPoolExecutor(2, torch.multiprocessing.get_context("spawn")) as pool:
        results = []
        for arguments in ((short_in, None), ("", sizes)):
            port = free_port()
            results += [
                one.result(TIME_LIMIT) for one in [pool.submit(learn, rank, port, *arguments) for rank in range(2)]
            ]
    first, *others = results
    assert first[3] == sizes
    for numbers, losses, state, of_process in others:
        assert (numbers, losses, of_process) == (first[0], first[1], sizes)
        assert all(np.array_equal(*pair) for pair in zip(state, first[2], strict=True))
