"""What is recorded, when, and what is played back: the recording itself, which only a GPU can make, is replaced by calling the function. tests/test_gpu.py has the real one."""

import pytest
import torch

import microbert.runtime.cuda_graph
from microbert.runtime.cuda_graph import WARM_UP, Captured

ONE = torch.tensor([1.0, 2.0])


@pytest.fixture
def recordings(monkeypatch):
    """What was recorded. Played back, the function is called on the places that the recording has."""
    made = []
    monkeypatch.setattr(microbert.runtime.cuda_graph, "record", lambda function: made.append(function) or function)
    return made


def new_recorded(is_on=True):
    calls = []

    def add(x, y, factor):
        calls.append((x, y, factor))
        return factor * (x if y is None else x + y)

    return Captured(add, torch.device("cpu"), is_on), calls


def test_it_is_recorded_after_a_few_calls_alike_and_reads_from_places_of_its_own(recordings):
    recorded, calls = new_recorded()
    for number in range(6):
        assert torch.equal(recorded((number * ONE, ONE), 3), 3 * (number + 1) * ONE)
        assert len(recordings) == recorded.has_recording == (number >= WARM_UP)
    assert all(x is calls[WARM_UP][0] and y is calls[WARM_UP][1] for x, y, _ in calls[WARM_UP:])


@pytest.mark.parametrize(
    "other", [((torch.ones(3), torch.ones(3)), 3), ((ONE, None), 3), ((ONE.int(), ONE), 3), ((ONE, ONE), 4)]
)
def test_other_arguments_are_computed_as_they_come_and_end_the_recording(recordings, other):
    recorded, calls = new_recorded()
    for _ in range(WARM_UP):
        recorded((ONE, ONE), 3)
        recorded(*other)
    assert not recordings  # never alike often enough in a row
    (x, y), factor = other
    for n_recordings in (1, 2):
        for _ in range(WARM_UP + 1):
            assert torch.equal(recorded((ONE, ONE), 3), 6 * ONE)
        assert recorded.has_recording and len(recordings) == n_recordings
        assert torch.equal(recorded(*other), factor * (x if y is None else x + y)) and calls[-1][0] is x
        assert not recorded.has_recording


def test_what_was_forgotten_is_recorded_anew(recordings):
    recorded, _ = new_recorded()
    for n_recordings in (1, 2):
        for _ in range(WARM_UP + 1):
            assert not recorded.has_recording
            recorded((ONE, ONE), 3)
        assert len(recordings) == n_recordings
        recorded.forget()


def test_what_is_off_or_cannot_be_recorded_is_called_as_it_is(monkeypatch, capsys):
    off, _ = new_recorded(is_on=False)

    def fails(_):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(microbert.runtime.cuda_graph, "record", fails)
    failing, calls = new_recorded()
    for one in (off, failing):
        assert all(torch.equal(one((ONE, ONE), 2), 4 * ONE) for _ in range(2 * WARM_UP + 2))
    assert len(calls) == 2 * WARM_UP + 2
    told = capsys.readouterr().err
    assert (
        told.count("hint: ") == 1 and "operation not permitted when stream is capturing" in told and not failing.is_on
    )
