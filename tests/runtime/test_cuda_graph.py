"""When a function is captured, replayed and discarded.

The capture itself requires a GPU, and is replaced by calls of the function here; tests/test_gpu.py has the real one.
"""

import pytest
import torch

import microbert.runtime.cuda_graph
from microbert.runtime.cuda_graph import WARM_UP, Captured

ONE = torch.tensor([1.0, 2.0])


@pytest.fixture
def captures(monkeypatch):
    """Return the captured functions. A replay calls the function with the tensors that the capture owns."""
    made = []
    monkeypatch.setattr(microbert.runtime.cuda_graph, "capture", lambda function, _: made.append(function) or function)
    return made


def new_captured(is_on=True, n_signatures=1):
    calls = []

    def add(x, y, factor):
        calls.append((x, y, factor))
        return factor * (x if y is None else x + y)

    return Captured(add, torch.device("cpu"), is_on, n_signatures), calls


def test_a_function_is_captured_after_a_few_equal_calls_and_reads_its_own_tensors(captures):
    captured, calls = new_captured()
    for number in range(6):
        assert torch.equal(captured((number * ONE, ONE), 3), 3 * (number + 1) * ONE)
        assert len(captures) == captured.has_graph == (number >= WARM_UP)
    assert all(x is calls[WARM_UP][0] and y is calls[WARM_UP][1] for x, y, _ in calls[WARM_UP:])


@pytest.mark.parametrize(
    "other", [((torch.ones(3), torch.ones(3)), 3), ((ONE, None), 3), ((ONE.int(), ONE), 3), ((ONE, ONE), 4)]
)
def test_other_arguments_are_computed_directly_and_discard_the_capture(captures, other):
    captured, calls = new_captured()
    for _ in range(WARM_UP):
        captured((ONE, ONE), 3)
        captured(*other)
    assert not captures  # never enough equal calls in succession
    (x, y), factor = other
    for n_captures in (1, 2):
        for _ in range(WARM_UP + 1):
            assert torch.equal(captured((ONE, ONE), 3), 6 * ONE)
        assert captured.has_graph and len(captures) == n_captures
        assert torch.equal(captured(*other), factor * (x if y is None else x + y)) and calls[-1][0] is x
        assert not captured.has_graph


def test_several_signatures_in_any_order_have_a_graph_each(captures):
    captured, calls = new_captured(n_signatures=3)
    arguments = [((ONE, ONE), 3), ((ONE, None), 3), ((torch.ones(3), torch.ones(3)), 3)]
    for number in range(WARM_UP + 3):
        for n_before, (tensors, factor) in enumerate(arguments):
            x, y = tensors
            expected = factor * (x if y is None else x + y)
            assert torch.equal(captured(tensors, factor), expected)
            assert len(captures) == min(max(0, 3 * (number - WARM_UP) + n_before + 1), 3)
    last = calls[-len(arguments) :]
    assert all(called[0] is not tensors[0] for called, (tensors, _) in zip(last, arguments, strict=True))  # its own
    captured((ONE, ONE), 4)  # one signature too many
    assert not captured.has_graph
    for n_calls in range(WARM_UP):
        assert torch.equal(captured((ONE, ONE), 3), 6 * ONE) and len(captures) == 3, n_calls
    captured((ONE, ONE), 3)
    assert len(captures) == 4


def test_graphs_that_are_discarded_do_not_share_memory_with_later_ones(monkeypatch):
    pools = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(microbert.runtime.cuda_graph, "free_memory", lambda device: None)
    monkeypatch.setattr(microbert.runtime.cuda_graph, "capture", lambda function, pool: pools.append(pool) or function)
    captured = Captured(lambda x: x, torch.device("cuda"), True, 2)
    for _ in range(WARM_UP + 1):
        captured((ONE,))
        captured((torch.ones(3),))
    captured.forget()
    for _ in range(WARM_UP + 1):
        captured((ONE,))
    assert len(pools) == 3 and pools[0] is pools[1] is not None and pools[2] not in (None, pools[0])


def test_a_discarded_function_is_captured_again(captures):
    captured, _ = new_captured()
    for n_captures in (1, 2):
        for _ in range(WARM_UP + 1):
            assert not captured.has_graph
            captured((ONE, ONE), 3)
        assert len(captures) == n_captures
        captured.forget()


def test_a_function_that_is_off_or_cannot_be_captured_is_called_directly(monkeypatch, capsys):
    off, _ = new_captured(is_on=False)

    def fails(*_):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(microbert.runtime.cuda_graph, "capture", fails)
    failing, calls = new_captured()
    for one in (off, failing):
        assert all(torch.equal(one((ONE, ONE), 2), 4 * ONE) for _ in range(2 * WARM_UP + 2))
    assert len(calls) == 2 * WARM_UP + 2
    errors = capsys.readouterr().err
    assert errors.count("hint: ") == 1 and "operation not permitted when stream is capturing" in errors
    assert not failing.is_on
