"""What the commands share: logging to the terminal, errors as one message and an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Callable

from lungkit._allocator import keep_freed_memory
from lungkit._terminal import coloured, set_quiet
from lungkit.errors import LungkitError, ResourceError

_LOG = logging.getLogger("lungkit")


def run_command(command: Callable[[], int]) -> int:
    """Run ``command``; an error that lungkit raises on purpose is printed, without a traceback, as its exit code.

    Exit codes: 0 ok, 1 other failure, 2 usage, 3 bad data, 4 checkpoint, 5 resources, 75 interrupted and saved,
    130 interrupted and not saved.
    """
    _encode_what_the_terminal_can()
    # A notebook names its own backend to the commands it starts; pictures here go to files alone.
    os.environ["MPLBACKEND"] = "agg"
    set_quiet(False)
    _log_to_terminal()
    keep_freed_memory()
    try:
        return command()
    except LungkitError as error:
        _LOG.error("error: %s", error)
        return error.exit_code
    except MemoryError as error:
        _LOG.error("error: out of memory (%s)", error)
        return ResourceError.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _LOG.error("error: the disk or quota is full (%s); free some space and run again", error)
        return ResourceError.exit_code
    except KeyboardInterrupt:
        _LOG.error("interrupted; nothing more was saved")
        return 130


def _encode_what_the_terminal_can() -> None:
    """A letter that the encoding of the output lacks is written as its code, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def be_quiet() -> None:
    """Show warnings and errors alone until the command ends; what is logged to files stays the same."""
    for handler in _LOG.handlers:
        if isinstance(handler, _TerminalHandler):
            handler.setLevel(logging.WARNING)


def _log_to_terminal() -> None:
    for handler in _LOG.handlers:
        if isinstance(handler, _TerminalHandler):
            handler.setLevel(logging.NOTSET)
            return
    handler = _TerminalHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False


class _TerminalHandler(logging.Handler):
    """Writes to what sys.stderr is at the moment, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = coloured(text, "red" if record.levelno >= logging.ERROR else "yellow")
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
