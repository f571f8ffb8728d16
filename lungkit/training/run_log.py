"""What lungkit logs during a run, from its first line on, in the run's ``train.log``."""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType

from lungkit._terminal import SafeFormatter
from lungkit.errors import LungkitError, UsageError

_LOG = logging.getLogger("lungkit")


class RunLog:
    """Remembers lungkit's log until :meth:`open` says where it goes, and writes it there from then on.

    Use as a context manager; afterwards the logger is as it was. Messages of level INFO are kept whether or not the
    program shows them: a run started from Python has the same log as one started from the command line. Where the
    program has set up no logging at all, they go to standard error too.

    Args:
        enabled: False does nothing, for all processes of a run but the first.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._memory = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.FileHandler | None = None
        self._terminal: logging.Handler | None = None
        self._level = _LOG.level

    def __enter__(self) -> RunLog:
        if not self._enabled:
            return self
        self._level = _LOG.level
        if _LOG.getEffectiveLevel() > logging.INFO:
            _LOG.setLevel(logging.INFO)
        if not _LOG.hasHandlers():
            self._terminal = logging.StreamHandler()
            self._terminal.setFormatter(SafeFormatter("%(message)s"))
            _LOG.addHandler(self._terminal)
        _LOG.addHandler(self._memory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._enabled:
            return
        if self._file is not None:
            if error is not None:
                self._write_error(error)
            _LOG.removeHandler(self._file)
            self._file.close()
        if self._terminal is not None:
            _LOG.removeHandler(self._terminal)
            self._terminal = None
        _LOG.removeHandler(self._memory)
        self._memory.close()
        _LOG.setLevel(self._level)

    def open(self, path: Path) -> None:
        """Append to ``path`` what was logged so far and all that follows; holds a lock on the file.

        Raises:
            UsageError: another process holds the lock.
        """
        file = _QuietFileHandler(path, encoding="utf-8", errors="backslashreplace")
        try:
            _lock(file.stream.fileno(), path)  # type: ignore[union-attr]
        except BaseException:
            file.close()
            raise
        file.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
        self._file = file
        self._memory.setTarget(file)
        self._memory.flush()
        _LOG.removeHandler(self._memory)
        _LOG.addHandler(file)

    def _write_error(self, error: BaseException) -> None:
        """Write why the run ended, to the file alone: whoever catches the error shows it to the user."""
        expected = isinstance(error, (LungkitError, KeyboardInterrupt))
        trace = None if expected else (type(error), error, error.__traceback__)
        message = str(error) or type(error).__name__
        record = _LOG.makeRecord(_LOG.name, logging.ERROR, __file__, 0, message, (), trace)
        if self._file is not None:
            self._file.handle(record)


class _QuietFileHandler(logging.FileHandler):
    """Gives up a line that cannot be written: on a full disk saving a checkpoint says so, once."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            return
        super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is still in the buffer
            super().close()


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UsageError(
                f"{path.parent}: another process is training this run; wait for it, or start a run of your own"
            ) from error
        # Some network file systems have no locks; a run there is as safe as its user is careful.
