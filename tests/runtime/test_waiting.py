"""Waiting ends when the call returns, or when the check raises."""

import threading

import pytest

from microbert.errors import Stopped
from microbert.runtime.waiting import in_background


def raise_stopped():
    raise Stopped("stopped")


def test_a_call_in_the_background_returns_and_raises_as_in_the_foreground():
    assert in_background(lambda: 3) == in_background(lambda: 3, raise_stopped, after=5) == 3
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0, raise_stopped, after=5)


def test_a_blocked_call_is_abandoned_when_the_check_raises():
    held = threading.Event()
    with pytest.raises(Stopped):
        in_background(held.wait, raise_stopped)
    held.set()
