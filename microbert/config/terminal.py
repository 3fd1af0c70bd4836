"""Keep running after stdout or stderr is closed, and whatever characters they can encode.

Ctrl-C ends `| tee log` together with the run, which still has a checkpoint to save; `| head` closes the pipe when it
has seen enough; a closed terminal accepts no more output. A terminal or log in cp1252 has no Thai letters.
"""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

NO_READER = {errno.EPIPE, errno.EIO}  # of a pipe, of a terminal; as Linux and macOS have it


class _SafeStream:
    """A text stream that escapes what its encoding lacks, and discards its output once its reader is gone.

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
                encoding = getattr(self._stream, "encoding", None) or "ascii"  # the error names a family: "charmap"
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
            is_file = stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode)  # where EIO means a damaged disk
            if error.errno not in NO_READER or is_file:
                raise
            _discard(self._stream)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Make printing raise nothing where a reader has gone or the encoding lacks a character.

    Other errors, such as a full disk, are raised. The streams may be of any kind, and are the same again afterwards.
    """
    streams = [stream and _SafeStream(stream) for stream in (sys.stdout, sys.stderr)]  # None where there is none
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in filter(None, streams):
                with contextlib.suppress(OSError):  # Python reports it at exit; here it would hide how the work ended
                    stream.flush()


def flush_or_discard() -> None:
    """Flush stdout and stderr, and discard what cannot be written: Python exits with 120 where its last flush fails."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Point the stream's descriptor at the null device, which also accepts what is still in its buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
