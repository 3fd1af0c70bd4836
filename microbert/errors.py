"""Exceptions that end a run with a message for the user."""


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
