"""How every command ends: an exit code and one message, and a traceback only for what lungkit did not foresee."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from lungkit.cli._common import run_command
from lungkit.errors import CheckpointError, DataError, Interrupted, LungkitError, ResourceError, UsageError


def failing(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


def test_a_command_that_works_ends_with_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: 0) == 0
    assert run_command(lambda: 3) == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "kind", [LungkitError, UsageError, DataError, CheckpointError, ResourceError, Interrupted]
)
def test_an_error_on_purpose_is_one_message_and_its_code(
    kind: type[LungkitError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(failing(kind("scan.nii.gz is cut off"))) == kind.exit_code
    assert capsys.readouterr().err == "error: scan.nii.gz is cut off\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_lack_of_resources(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(OSError(number, "no space"))) == ResourceError.exit_code
    assert "free some space and run again" in capsys.readouterr().err


def test_lack_of_memory_is_a_lack_of_resources(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(MemoryError("4 GiB"))) == ResourceError.exit_code
    assert "out of memory (4 GiB)" in capsys.readouterr().err


def test_an_interruption_says_that_nothing_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(KeyboardInterrupt())) == 130
    assert "nothing more was saved" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ZeroDivisionError("a bug")])
def test_what_nobody_foresaw_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command(failing(error))


def test_a_terminal_is_shown_names_and_does_not_obey_them(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise DataError("scan\x1b]0;title\x07\x1b[2J.nii.gz: damaged\r\u202e\nsecond line")

    assert run_command(command) == DataError.exit_code
    shown = capsys.readouterr().err
    assert shown == "error: scan\\x1b]0;title\\x07\\x1b[2J.nii.gz: damaged\\r\\u202e\nsecond line\n"
