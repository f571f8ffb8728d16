"""Errors that lungkit raises for its users, each with the exit code a command ends with."""

from __future__ import annotations

import os
from collections.abc import Iterable


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


class ResourceError(LungkitError):
    """The machine ran out of something: disk, memory, a device."""

    exit_code = 5


class Interrupted(LungkitError):
    """The run was interrupted and its state saved; it can be resumed."""

    exit_code = 75


def readable(name: str | os.PathLike[str]) -> str:
    """A name as text for a message, whatever its bytes are."""
    return os.fspath(name).encode(errors="backslashreplace").decode()


def shorten(names: Iterable[str | os.PathLike[str]], limit: int = 5) -> str:
    """The first few of ``names`` for a message, and how many more there are.

    Example:
        >>> shorten(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    listed = [readable(name) for name in names]
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
