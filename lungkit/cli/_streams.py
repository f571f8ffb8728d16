"""Standard output and error that outlive what they lead to: a pipe without a reader, a lost terminal, a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast


class LastingStream:
    """A text stream whose writing never fails: once it does, everything after it goes nowhere.

    ``error`` is then why the first text was lost; None while everything has arrived. What else writes to the same
    descriptor, libraries and child processes, goes nowhere from then on too. All but writing is the stream's own.

    Args:
        stream: the stream; None where the process was started without it (``2>&-``).
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self.error: OSError | None = None
        self._is_closed = stream is None
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115, PTH123

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As that of a text stream."""
        if self._is_closed and text:
            self._is_closed, self.error = False, OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
            self._lose(error)
        except RuntimeError as error:
            # A signal came in the middle of writing, and what it has to say cannot be said in between.
            if "reentrant" not in str(error):
                raise
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As that of a text stream."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As that of a text stream."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: OSError | ValueError) -> None:
        if self.error is None:
            self.error = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            # What waits in the stream's buffer can be written to the same descriptor, and is no error at the exit.
            os.dup2(null, self._stream.fileno())
            os.close(null)
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


@contextlib.contextmanager
def lasting_streams() -> Iterator[LastingStream]:
    """Make ``sys.stdout`` and ``sys.stderr`` such streams for as long as the block lasts; gives that of the output."""
    _keep_descriptors()
    before = sys.stdout, sys.stderr
    output, errors = LastingStream(sys.stdout), LastingStream(sys.stderr)
    sys.stdout, sys.stderr = cast("Any", output), cast("Any", errors)
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


def _keep_descriptors() -> None:
    """Fill the places of closed standard streams, so that no file that is opened later gets what is written to them."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
