"""The errors of lungkit: which of Python's own they are, and the exit codes they stand for."""

from __future__ import annotations

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
