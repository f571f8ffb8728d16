"""The end of a process that was one of several."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys

_one_of_several = False


def become_one_of_several() -> None:
    """From here on :func:`leave` ends this process by itself."""
    global _one_of_several
    _one_of_several = True


def leave(code: int) -> int:
    """``code``, the exit code of a command; a process that was one of several ends here, with it.

    What is registered to be done at the end is done, and files are flushed, but the interpreter is not taken apart:
    threads of gloo outlive their process group, and now and then abort a process in which they meet that.
    """
    if not _one_of_several:
        return code
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # It may be a pipe without a reader, closed, or absent.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
