"""The errors of lungkit: which of Python's own they are, and the exit codes they stand for."""

from __future__ import annotations

import errno

import pytest

from lungkit import errors
from lungkit.errors import LungkitError

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LungkitError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_is_caught_as_lungkits(kind: type[LungkitError]) -> None:
    with pytest.raises(LungkitError, match="why"):
        raise kind("why")


@pytest.mark.parametrize(
    ("name", "builtin"),
    [("UsageError", ValueError), ("DataError", ValueError), ("LabelError", RuntimeError)],
)
def test_wrong_values_are_caught_as_pythons_error_too(name: str, builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="why"):
        raise getattr(errors, name)("why")


def test_exit_codes_are_those_that_scripts_rely_on() -> None:
    assert {kind.__name__: kind.exit_code for kind in ERRORS} == {
        "LungkitError": 1,
        "UsageError": 2,
        "LabelError": 2,
        "DataError": 3,
        "CheckpointError": 4,
        "UnsupportedModelError": 4,
        "ResourceError": 5,
        "Interrupted": 75,
    }


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 2, "a: File name too long"),
        (OSError(errno.EROFS, "Read-only file system", "a"), 2, "a: Read-only file system"),
        (OSError(errno.EIO, "Input/output error", b"a"), 5, "a: Input/output error; the disk or"),
        (OSError(errno.EMFILE, "Too many open files"), 5, "ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device"), 5, "disk or quota is full"),
        (OSError(errno.EFBIG, "File too large", "a"), 5, "a: a file would be larger than a limit allows"),
        (OSError(errno.EXDEV, "Cross-device link", "a", None, "b"), 5, "a -> b: Cross-device link"),
        (OSError("400 requested and 200 written"), 5, "is full"),
        (MemoryError(), 5, "out of memory"),
        (RuntimeError("can't start new thread"), 5, "no more threads can be started"),
        (RuntimeError("basic_ios::clear: iostream error"), 5, "limit on files (ulimit -f) is full"),
        (RuntimeError("std::bad_alloc"), 5, "out of memory"),
    ],
)
def test_errors_of_the_system_are_one_sentence_and_a_code(error: Exception, code: int, text: str) -> None:
    told = errors.of_system(error)
    assert told is not None and told.exit_code == code
    assert text in str(told) and "\n" not in str(told)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), KeyError("a")])
def test_other_errors_are_not_the_systems(error: Exception) -> None:
    assert errors.of_system(error) is None
