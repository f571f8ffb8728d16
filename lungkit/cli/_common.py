"""What the commands share: logging to the terminal, errors as one message and an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lungkit._allocator import keep_freed_memory
from lungkit._leaving import leave
from lungkit._terminal import SafeFormatter, coloured, set_quiet
from lungkit.cli._streams import lasting_streams
from lungkit.errors import Interrupted, LungkitError, ResourceError, of_system

_LOG = logging.getLogger("lungkit")


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which a command takes as it takes Ctrl-C."""


def run_command(command: Callable[[], int]) -> int:
    """Run ``command``; an error that lungkit or the system raises is one message, without a traceback, and a code.

    Standard output and error may go away meanwhile, and the command goes on in silence: its files and its log are what
    counts. Only where its result was to be read on the output, and has not arrived, that is an error.

    A process that trained as one of several does not return from here, but ends with the code.

    Exit codes: 0 ok, 1 other failure, 2 usage, 3 bad data, 4 checkpoint, 5 resources, 75 interrupted and saved (SIGTERM
    or SIGHUP: what was done stays), 130 interrupted and not saved.
    """
    _encode_what_the_terminal_can()
    # A notebook names its own backend to the commands it starts; pictures here go to files alone.
    os.environ["MPLBACKEND"] = "agg"
    set_quiet(False)
    with lasting_streams() as output:
        _log_to_terminal()
        keep_freed_memory()
        try:
            with _termination():
                code = _exit_code(command)
        except SystemExit as stop:
            output.flush()
            if stop.code or not _is_lost(output.error):
                if stop.code is None or isinstance(stop.code, int):
                    leave(stop.code or 0)
                raise
            code = 0
        output.flush()
        if code == 0 and _is_lost(output.error):
            _LOG.error("error: standard output cannot be written (%s)", output.error)
            code = ResourceError.exit_code
    return leave(code)


def _exit_code(command: Callable[[], int]) -> int:
    try:
        return command()
    except LungkitError as error:
        _LOG.error("error: %s", error)
        return error.exit_code
    except (OSError, MemoryError, RuntimeError) as error:
        told = of_system(error)
        if told is None:
            raise
        _LOG.error("error: %s", told)
        return told.exit_code
    except Terminated as error:
        _LOG.error("stopped by %s; what was done stays", error)
        return Interrupted.exit_code
    except KeyboardInterrupt:
        _LOG.error("interrupted; nothing more was saved")
        return 130


def _is_lost(error: OSError | None) -> bool:
    """Whether somebody misses what was written; not whoever closed the pipe, as ``| head`` does."""
    return error is not None and error.errno != errno.EPIPE


@contextmanager
def _termination() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise :class:`Terminated`, but for those that are ignored (``nohup``)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated(signal.Signals(number).name)

    numbers = [
        number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
    ]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


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
    handler.setFormatter(SafeFormatter("%(message)s"))
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
