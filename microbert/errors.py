"""Exceptions that end a run with a message for the user."""

LONGEST_REASON = 300  # characters of an error that a message quotes


class InputError(Exception):
    """An error that the user can fix. The message is one or two plain lines; the exit code is 2."""


class Stopped(Exception):
    """A signal asked the run to stop, and everything is saved; the exit code is 75."""


class Failed(Exception):
    """The run cannot continue, for a reason other than its input. The message gives the reason and what to try.

    rank: of the process where the error occurred, if another one raises it.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class Diverged(Failed):
    """The loss, the gradient or the weights are NaN or infinite."""


def one_line(error: Exception) -> str:
    """Return the error's message as one line, cut to LONGEST_REASON because it may quote a file."""
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
