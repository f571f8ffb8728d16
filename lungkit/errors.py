"""Errors that lungkit raises for its users, each with the exit code a command ends with."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable

from lungkit._text import printable


class LungkitError(Exception):
    """Base of every error that lungkit raises on purpose; ``exit_code`` is what a command returns."""

    exit_code = 1


class UsageError(LungkitError, ValueError):
    """An option, argument or configuration value is wrong."""

    exit_code = 2


class LabelError(UsageError, RuntimeError):
    """Labels hold a value that is no class. Compiled code raises it as the RuntimeError that it is as well."""


class DataError(LungkitError, ValueError):
    """A scan, a mask or a dataset cannot be used; the message names the file."""

    exit_code = 3


class CheckpointError(LungkitError):
    """A checkpoint is missing, corrupt or belongs to another model."""

    exit_code = 4


class UnsupportedModelError(CheckpointError):
    """A model of another program asks for what lungkit does not have; the message names it."""


class ResourceError(LungkitError):
    """The machine ran out of something: disk, memory, a device."""

    exit_code = 5


class Interrupted(LungkitError):
    """The run was interrupted and its state saved; it can be resumed."""

    exit_code = 75


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EINVAL,
}  # fmt: skip
_ADVICE = {
    errno.EMFILE: "; too many files are open at once: raise the limit (ulimit -n)",
    errno.ENFILE: "; too many files are open on this machine",
    errno.ESTALE: "; the network file system has lost the file: run again",
    errno.EIO: "; the disk or the network file system fails",
    errno.EAGAIN: "; too many processes or threads: raise the limit (ulimit -u)",
}
# See lungkit._temporary and lungkit.checkpoint.
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}-[0-9a-f]{6}-[0-9a-f]+\.tmp-|\.[0-9a-f]{12}\.new-")
_SHORT_WRITES = ("PytorchStreamWriter", "unexpected pos", "basic_ios", "iostream error", "basic_filebuf")
_NO_THREADS = ("can't start new thread", "Resource temporarily unavailable", "thread creation failed")
_NO_MEMORY = ("DefaultCPUAllocator", "std::bad_alloc", "out of memory")


def of_system(error: BaseException) -> LungkitError | None:
    """What to tell of an error of the operating system in one sentence; None where ``error`` is something else.

    Names that cannot be used as they are (absent, no permission, read-only) are :class:`UsageError`; what the machine
    lacks (disk, memory, threads, open files) or fails in is :class:`ResourceError`.

    Example:
        >>> import errno
        >>> of_system(PermissionError(errno.EACCES, "Permission denied", "runs/a"))
        UsageError('runs/a: Permission denied; check the path and its permissions')
        >>> of_system(ZeroDivisionError()) is None
        True
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        if is_full(error):
            return ResourceError(f"{_named(error)}; free some space and run again")
        if error.errno in _REFUSED:
            return UsageError(f"{_named(error)}; check the path and its permissions")
        return ResourceError(_named(error) + _ADVICE.get(error.errno or 0, ""))
    if isinstance(error, MemoryError):
        return ResourceError(f"out of memory ({text})" if text else "out of memory")
    if isinstance(
        error, RuntimeError
    ):  # what C++ raises is one of these, and its text alone says what it was
        if is_full(error):
            return ResourceError(f"{reason_of_full(error)} ({text}); free some space and run again")
        if any(sign in text for sign in _NO_THREADS):
            return ResourceError(f"no more threads can be started ({text}); raise the limit (ulimit -u)")
        if any(sign in text for sign in _NO_MEMORY):
            return ResourceError(f"out of memory ({text})")
    return None


def is_full(error: BaseException) -> bool:
    """Whether ``error`` says that a disk, a quota or a limit of files is full."""
    text = str(error)
    if isinstance(error, OSError):
        # numpy.tofile reports a short write without an errno.
        return error.errno in _FULL or (error.errno is None and "requested and" in text)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SHORT_WRITES)


def reason_of_full(error: BaseException | None) -> str:
    """Which of them is full, as far as an error tells for which :func:`is_full` is true."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EFBIG:
        return "a file would be larger than a limit allows (ulimit -f)"
    return (
        "the disk or quota is full" if number else "the disk, quota or a limit on files (ulimit -f) is full"
    )


def final_name(path: str | os.PathLike[str]) -> str:
    """A path for a message; a file that is being written is told by the name that it was to have.

    Example:
        >>> final_name("runs/.0a1b2c3d-e4f5a6-1f2e.tmp-run/config.yaml")
        'runs/run/config.yaml'
    """
    return _TEMPORARY.sub("", readable(path))


def _named(error: OSError) -> str:
    """The file or files, where there are any, and the reason."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if is_full(error):
        reason = f"{reason_of_full(error)} ({reason})"
    names = [
        final_name(os.fsdecode(name))
        for name in (error.filename, error.filename2)
        if isinstance(name, (str, bytes))
    ]
    names = list(dict.fromkeys(names))
    return f"{' -> '.join(names)}: {reason}" if names else reason


def readable(name: str | os.PathLike[str]) -> str:
    """A name as text for a message, whatever its bytes are: on one line, and nothing in it that a terminal obeys."""
    return printable(os.fspath(name))


def shorten(names: Iterable[str | os.PathLike[str]], limit: int = 5) -> str:
    """The first few of ``names`` for a message, and how many more there are.

    Example:
        >>> shorten(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    listed = [readable(name) for name in names]
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
