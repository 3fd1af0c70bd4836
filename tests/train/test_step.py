"""One update: running out of memory halves the micro-batch; non-finite numbers leave the weights unchanged."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from configs import configure
from helpers import ROOT, result
from launches import faulty_script, flags_of, launch
from models import VOCAB_SIZE, as_batch, noisy_model, token_rows

import microbert.runtime.cuda_graph
import microbert.train.step
from microbert.data.masking import mask_batch
from microbert.data.tokenizer import CLS_ID, PAD_ID, SEP_ID, UNK_ID
from microbert.errors import Diverged, Failed
from microbert.runtime.distributed import World
from microbert.train.step import Learner

V4 = ROOT / "mlm_pretrain_v4.py"
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"


def masked_rows(n=8, seed=0):
    return mask_batch(as_batch(token_rows(n, seed=seed)), seed=seed, probability=0.3, vocab_size=VOCAB_SIZE)


def new_learner(**constants):
    model = noisy_model(dropout=constants.get("dropout", 0.0), arch=constants.get("arch", "bert"))
    return Learner(model, configure(batch_size=8, **constants), World.alone())


def run_short(monkeypatch, capacity, message=NO_MEMORY, after=0):
    """Make micro-batches of more than `capacity` rows (of 5 slots) run out of memory, after `after` calls."""
    real, calls = microbert.train.step.masked_loss, []

    def masked_loss(hidden, *others):
        calls.append(len(hidden) // 5)
        if calls[-1] > capacity and len(calls) > after:
            raise torch.OutOfMemoryError(message)
        return real(hidden, *others)

    monkeypatch.setattr(microbert.train.step, "masked_loss", masked_loss)
    return calls


def test_a_step_without_a_masked_token_changes_nothing(recwarn):
    learner = new_learner(weight_decay=0)
    before = [parameter.clone() for parameter in learner.model.parameters()]
    rows = np.array([[CLS_ID, UNK_ID, SEP_ID, PAD_ID]] * 8)
    masked = mask_batch(as_batch(rows), seed=0, probability=0.3, vocab_size=VOCAB_SIZE)
    assert learner.step(masked, 0, 1e-2).read() == (0.0, 0.0)
    assert all(torch.equal(*pair) for pair in zip(learner.model.parameters(), before, strict=True))
    assert not [warning for warning in recwarn if "divide" in str(warning.message)]


def test_the_micro_batch_is_halved_until_it_fits_with_the_same_result(monkeypatch, capsys):
    expected = new_learner(micro_batch_size=2, dropout=0.1)
    numbers = [expected.step(masked_rows(seed=n), n, 1e-2).read() for n in range(3)]
    calls = run_short(monkeypatch, 2, after=4)
    learner = new_learner(dropout=0.1, micro_batch_size=4)
    calls += [0, 0, 0, 0]  # as if this were after the first step
    assert [learner.step(masked_rows(seed=n), n, 1e-2).read() for n in range(3)] == numbers
    assert calls[4:] == [4, 2, 2, 2, 2] + [2, 2, 2, 2] * 2
    assert (learner.sizes.micro_batch, learner.sizes.ran_short) == (2, True)
    for parameter, other in zip(learner.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(parameter, other)
    message = capsys.readouterr().err
    assert (
        message.count("out of memory") == 2
        and "step 0: out of memory with 4 sequences of 128 tokens at a time" in message
        and "2.00 GiB" in message
    )


@pytest.mark.fault(row=26)
def test_without_memory_for_one_sequence_the_error_names_batch_length_and_bytes(monkeypatch):
    run_short(monkeypatch, 0)
    learner = new_learner()
    before = [parameter.clone() for parameter in learner.model.parameters()]
    with pytest.raises(Failed) as caught:
        learner.step(masked_rows(), 3, 1e-2)
    assert all(word in str(caught.value) for word in ("step 3", "one sequence of 128 tokens", "0.0", " GB", "2.00 GiB"))
    assert all(torch.equal(*pair) for pair in zip(before, learner.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:122] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 9 bytes.",
        "MPS backend out of memory (MPS allocated: 1.00 GB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_the_messages_of_every_device_are_recognised(message, monkeypatch):
    real = microbert.train.step.masked_loss

    def masked_loss(hidden, *others):
        if len(hidden) > 20:
            raise RuntimeError(message)
        return real(hidden, *others)

    monkeypatch.setattr(microbert.train.step, "masked_loss", masked_loss)
    learner = new_learner()
    learner.step(masked_rows(), 0, 1e-2)
    assert learner.sizes.micro_batch == 4


def test_another_error_is_raised_unchanged(monkeypatch):
    def masked_loss(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(microbert.train.step, "masked_loss", masked_loss)
    with pytest.raises(RuntimeError, match="shapes"):
        new_learner().step(masked_rows(), 0, 1e-2)


@pytest.mark.fault(row=24)
def test_after_non_finite_numbers_no_step_is_applied(monkeypatch):
    learner = new_learner()
    learner.step(masked_rows(), 0, 1e-2).read()
    before = [tensor.clone() for tensor in (*learner.model.parameters(), *learner.optimizer.tensors().values())]
    real = microbert.train.step.masked_loss
    monkeypatch.setattr(microbert.train.step, "masked_loss", lambda *arguments: real(*arguments) * float("nan"))
    broken = learner.step(masked_rows(), 1, 1e-2)
    monkeypatch.undo()
    later = learner.step(masked_rows(), 2, 1e-2)
    with pytest.raises(Diverged, match="step 1: the loss is nan"):
        broken.read()
    assert all(np.isfinite(later.read()))
    after = [*learner.model.parameters(), *learner.optimizer.tensors().values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_gradient_is_clipped_to_grad_clip():
    learner, free = new_learner(grad_clip=0.01), new_learner(grad_clip=None)
    numbers = [one.step(masked_rows(), 0, 0.0).read() for one in (learner, free)]
    assert numbers[0] == numbers[1] and numbers[0][1] > 0.01
    norms = [
        torch.cat([parameter.grad.flatten() for parameter in one.model.parameters()]).norm().item()
        for one in (learner, free)
    ]
    assert norms == pytest.approx([0.01, numbers[0][1]], rel=1e-3)


def test_in_bf16_a_step_is_about_the_same():
    exact, narrow = (new_learner(dtype=dtype).step(masked_rows(), 0, 1e-2).read() for dtype in ("float32", "bfloat16"))
    assert narrow != exact and narrow == pytest.approx(exact, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("constants, arch", [({}, "bert"), ({"dropout": 0.1, "micro_batch_size": 3}, "modern")])
def test_a_compiled_model_learns_the_same_and_is_saved_under_the_same_names(constants, arch, precompiled_headers):
    eager, compiled = new_learner(arch=arch, **constants), new_learner(arch=arch, torch_compile=True, **constants)
    for number in range(3):
        numbers = [learner.step(masked_rows(seed=number), number, 1e-2).read() for learner in (eager, compiled)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)
    assert list(compiled.model.state_dict()) == list(eager.model.state_dict())


def test_all_micro_batches_have_one_shape_if_compiled(monkeypatch):
    shapes, eager = [], new_learner(micro_batch_size=3)
    real = torch.compile

    def compiled(model, **options):
        assert options == {"dynamic": False}
        return lambda input_ids, attention_mask, *others: (
            shapes.append((input_ids.shape, attention_mask is None)) or model(input_ids, attention_mask, *others)
        )

    monkeypatch.setattr(torch, "compile", compiled)
    learner = new_learner(micro_batch_size=3, torch_compile=True)
    numbers = [one.step(masked_rows(), 0, 1e-2).read() for one in (learner, eager)]
    assert shapes == [((3, 16), False)] * 3 and numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    run_short(monkeypatch, 2)
    learner.step(masked_rows(), 1, 1e-2)
    assert set(shapes[3:]) == {((3, 16), False), ((2, 16), False)} and real is not torch.compile


@pytest.mark.parametrize(
    "constants", [{}, {"dropout": 0.1, "micro_batch_size": 3}, {"arch": "modern", "optimizer": "muon", "packing": True}]
)
def test_replayed_steps_are_the_same(monkeypatch, constants):
    """Up to fp32 instead of Python numbers.

    In place of a CUDA graph, the function is called again, and all that a graph would read and write must stay where
    it is in memory.
    """
    plain, made = new_learner(**constants), []
    monkeypatch.setattr(microbert.train.step, "is_captured", lambda *_: True)
    monkeypatch.setattr(microbert.runtime.cuda_graph, "capture", lambda function, _: made.append(function) or function)
    learner = new_learner(**constants)

    def places():
        tensors = [
            *learner.model.parameters(),
            *(parameter.grad for parameter in learner.model.parameters()),
            *learner.optimizer.tensors().values(),
            learner._is_broken,
            *(state["step"] for state in learner.optimizer.members[0].state.values()),
        ]
        return [tensor.data_ptr() for tensor in tensors]

    for number in range(8):
        masked = masked_rows(seed=number)
        if number == 4:  # one smaller batch
            masked = dataclasses.replace(
                masked, **{name: getattr(masked, name)[:5] for name in ("input_ids", "positions", "labels")}
            )
        numbers = [one.step(masked, number, (number + 1) * 2e-3).read() for one in (plain, learner)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)
        if number == 1:  # before anything is captured
            stayed = places()
    assert places() == stayed
    rates = [group["lr"] for member in learner.optimizer.members for group in member.param_groups]
    assert all(
        rate.data_ptr() == graph.inputs[1][1].data_ptr() for rate in rates for graph in learner._update._graphs.values()
    )  # a graph reads the rate of the step from there
    for parameter, other in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-5)
    assert len(made) == 3 and learner._backward.has_graph


@pytest.mark.parametrize("constants", [{}, {"dropout": 0.1, "micro_batch_size": 3}])
def test_rows_of_several_lengths_are_captured_once_each_and_computed_the_same(monkeypatch, constants):
    """Lengths and padding alternate; the third micro-batch of each kind and all later ones are replayed."""
    constants |= {"rows": "documents", "packing": True, "arch": "modern", "global_batch_size": 8, "max_seq_len": 16}
    plain, made = new_learner(**constants), []
    monkeypatch.setattr(microbert.train.step, "is_captured", lambda *_: True)
    monkeypatch.setattr(microbert.runtime.cuda_graph, "capture", lambda function, _: made.append(function) or function)
    learner = new_learner(**constants)
    kinds = [(16, 8, False), (8, 16, True), (4, 32, False), (16, 8, True)]  # rows, tokens of a row, with padding
    for number in range(4 * len(kinds)):
        n_rows, length, has_padding = kinds[number % len(kinds)]
        rows = token_rows(n_rows, length, seed=number, shortest=1 if has_padding else length - 2)
        masked = mask_batch(as_batch(rows), seed=number, probability=0.3, vocab_size=VOCAB_SIZE)
        numbers = [one.step(masked, number, 1e-3).read() for one in (plain, learner)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)
        n_kinds = max(0, min(number - 2 * len(kinds) + 1, len(kinds)))
        assert "micro_batch_size" in constants or len(made) == n_kinds + (number >= 2)
    assert len(made) == len(kinds) + 1  # and one update of the weights
    for parameter, other in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-5)


def test_a_micro_batch_has_as_many_tokens_at_each_length(monkeypatch):
    real, sizes = microbert.train.step.masked_loss, []

    def masked_loss(hidden, *others):
        sizes.append(len(hidden))
        return real(hidden, *others)

    monkeypatch.setattr(microbert.train.step, "masked_loss", masked_loss)
    constants = {"rows": "documents", "packing": True, "arch": "modern", "global_batch_size": 8, "max_seq_len": 16}
    learner = new_learner(micro_batch_size=2, **constants)
    for n_rows, length in ((16, 8), (8, 16), (4, 32), (1, 128)):
        masked = mask_batch(as_batch(token_rows(n_rows, length)), seed=0, probability=0.3, vocab_size=VOCAB_SIZE)
        sizes.clear()
        learner.step(masked, 0, 1e-3).read()
        assert sizes == [masked.labels.size // min(4, n_rows)] * min(4, n_rows)


def test_after_running_out_of_memory_nothing_is_captured(monkeypatch, capsys):
    monkeypatch.setattr(microbert.train.step, "is_captured", lambda *_: True)
    made = []
    monkeypatch.setattr(microbert.runtime.cuda_graph, "capture", lambda function, _: made.append(function) or function)
    learner = new_learner()
    for number in range(4):
        learner.step(masked_rows(seed=number), number, 1e-3).read()
    assert len(made) == 2
    run_short(monkeypatch, 4)
    for number in range(4, 8):
        learner.step(masked_rows(seed=number), number, 1e-3).read()
    assert (
        learner.sizes.micro_batch == 4
        and not learner._backward.has_graph
        and not learner._update.has_graph
        and len(made) == 2
    )


def short_of_memory(folder, name, text):
    """Return v4 with `text` run before the second micro-batch of each step. It may use `number` (step) and `rank`."""
    return faulty_script(
        folder / name,
        f"""import signal, torch
import microbert.train.step as step
real_step, real_loss, now = step.Learner.step, step.masked_loss, dict()
def counted(self, masked, number, *others):
    now.update(number=number, calls=0)
    return real_step(self, masked, number, *others)
def masked_loss(hidden, *others):
    now["calls"] += 1
    number, n_rows, is_last = now["number"], len(hidden) // 5, rank == int(os.environ.get("WORLD_SIZE", 1)) - 1
    if now["calls"] == 2:
        {text}
    return real_loss(hidden, *others)
step.Learner.step, step.masked_loss = counted, masked_loss""",
        script=V4,
    )


@pytest.mark.parametrize("n_processes", [1, 2])
@pytest.mark.fault(row=26)
@pytest.mark.slow
def test_running_out_of_memory_equals_resuming_with_the_smaller_micro_batch(n_processes, tmp_path):
    runs_out = short_of_memory(
        tmp_path,
        "runs_out.py",
        f"if is_last and number >= 25 and n_rows > 2 // {n_processes}: raise torch.OutOfMemoryError({NO_MEMORY!r})",
    )
    stops = short_of_memory(
        tmp_path, "stops.py", "if number == 23: os.kill(os.getpid(), signal.SIGTERM)"
    )  # noticed at the next step, the 25th

    def begin(name, script, **constants):
        flags = flags_of(
            tmp_path,
            n_processes,
            **{
                "output_dir": tmp_path / name,
                "rows": "packed",  # so that every row has 5 slots
                "micro_batch_size": 4 // n_processes,
                "dropout": 0.1,
                "mlm_probability": 0.15,
                "keep_checkpoints": 100,
                **constants,
            },
        )
        return launch(flags, n_processes, script=script, module="torch.distributed.run")

    code, out, err = begin("short", runs_out)
    assert code == 0, err
    assert (
        err.count("out of memory") == 2
        and f"step 25: out of memory with {4 // n_processes} sequences" in err
        and "Traceback" not in err
    )
    assert n_processes == 1 or "process 1 of 2: CUDA out of memory" in err

    begin("stopped", stops)
    assert (tmp_path / "stopped" / "checkpoint-25").exists()
    code, out, err = begin("stopped", V4, micro_batch_size=2 // n_processes)
    assert code == 0 and "resuming after step 25" in out, err
    assert result(tmp_path / "short") == result(tmp_path / "stopped")

    # the halved micro-batch is saved: the first command resumes with it
    state = json.loads((tmp_path / "short" / "checkpoint-60" / "state.json").read_text())
    assert (
        state["state"]["micro_batch_size"] == 2 // n_processes
        and state["config"]["micro_batch_size"] == 4 // n_processes
    )
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "short" / "checkpoint-60", tmp_path / "again" / "checkpoint-60")
    shutil.copy(tmp_path / "short" / "metrics.jsonl", tmp_path / "again")
    code, out, err = begin("again", V4)
    size = "2 sequences" if n_processes == 1 else "1 sequence"
    message = f"from {tmp_path / 'again' / 'checkpoint-60'}, with {size} of "
    assert code == 0 and f"resuming after step 60, {message}" in out, err
    assert result(tmp_path / "again") == result(tmp_path / "short")
