"""Keep running after stdout or stderr is closed, and when their encoding lacks a character.

Ctrl-C ends `| tee log` before the run has saved its checkpoint, `| head` closes the pipe after ten lines, and a closed
terminal accepts no output. A terminal or log in cp1252 has no Thai letters.
"""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

NO_READER = {errno.EPIPE, errno.EIO}  # from a pipe and from a terminal, on Linux and macOS


class _SafeStream:
    """A text stream that escapes characters its encoding lacks, and discards its output once the reader is gone.

    Writing to its `buffer` raises as usual.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._without_error():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # before anything is written
                encoding = getattr(self._stream, "encoding", None) or "ascii"  # the error itself only says "charmap"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
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
            is_file = stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode)  # then EIO means a damaged disk
            if error.errno not in NO_READER or is_file:
                raise
            _discard(self._stream)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Let prints succeed when the reader is gone or the encoding lacks a character.

    Other errors, such as a full disk, are raised. The streams may be of any type, and are restored afterwards.
    """
    # a stream is None if it was closed before the start
    streams = [stream and _SafeStream(stream) for stream in (sys.stdout, sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in filter(None, streams):
                with contextlib.suppress(OSError):  # Python reports it at exit; here it would hide another error
                    stream.flush()


def counted(number: int, noun: str) -> str:
    """Return "1 step" or "2,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def flush_or_discard() -> None:
    """Flush stdout and stderr, and discard what cannot be written: Python exits with 120 if its last flush fails."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Redirect the stream's descriptor to the null device, so that its buffer can be flushed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
