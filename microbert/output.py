"""What is printed, once nobody reads it any more: dropped, and the work goes on.

Ctrl-C ends `| tee log` together with the run, which has a checkpoint to save first; `| head` leaves when it has seen enough; a terminal that is closed
takes no more from what still runs in it.
"""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

NO_READER = {errno.EPIPE, errno.EIO}  # of a pipe, of a terminal; as Linux and macOS have it


class _Outlasting:
    """A text stream as it was, until its reader is gone; from then on it leads nowhere. What goes past it, to `buffer`, raises as ever."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._without_error():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._without_error():
            self._stream.flush()

    @contextlib.contextmanager
    def _without_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in NO_READER or stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode):  # of a file, EIO tells of its disk
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # there goes also what is still in its buffer, and what Python flushes at its end
            os.close(nowhere)


@contextlib.contextmanager
def outlasting_readers() -> Iterator[None]:
    """Standard output and error raise nothing inside where their reader has gone away; any other error is raised, such as a full disk behind `> log`."""
    streams = [stream and _Outlasting(stream) for stream in (sys.stdout, sys.stderr)]  # None where there is none
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in filter(None, streams):
                with contextlib.suppress(OSError):  # Python tells of it at its end; here it would hide how the work has ended
                    stream.flush()
