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
    monkeypatch.setattr(microbert.runtime.cuda_graph, "capture", lambda function: made.append(function) or function)
    return made


def new_captured(is_on=True):
    calls = []

    def add(x, y, factor):
        calls.append((x, y, factor))
        return factor * (x if y is None else x + y)

    return Captured(add, torch.device("cpu"), is_on), calls


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

    def fails(_):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(microbert.runtime.cuda_graph, "capture", fails)
    failing, calls = new_captured()
    for one in (off, failing):
        assert all(torch.equal(one((ONE, ONE), 2), 4 * ONE) for _ in range(2 * WARM_UP + 2))
    assert len(calls) == 2 * WARM_UP + 2
    errors = capsys.readouterr().err
    assert errors.count("hint: ") == 1 and "operation not permitted when stream is capturing" in errors
    assert not failing.is_on
