"""Atomic writing: the old file or the whole new one, and nothing left behind."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from lungkit._atomic import atomic_path, write_json_atomic, write_text_atomic
from lungkit.errors import ResourceError, UsageError


def test_success_replaces_the_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    write_text_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_failure_keeps_the_old_file_and_removes_the_temporary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_temporary_keeps_the_suffix_so_that_numpy_writes_where_it_is_told(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.npy") as temporary:
        np.save(temporary, np.arange(3))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("1000 requested and 496 written"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=["disk", "quota", "numpy", "torch"],
)
def test_full_disk_is_a_resource_error_naming_the_file(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(ResourceError, match=r"a\.bin") as caught,
        atomic_path(tmp_path / "a.bin") as temporary,
    ):
        temporary.write_bytes(b"half")
        raise error
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists and is writable"):
        write_text_atomic(tmp_path / "nowhere" / "a.txt", "x")


def test_error_about_another_file_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text((tmp_path / "absent.txt").read_text())


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "a.json", {"dice": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_json_round_trips(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"fold": 0})
    assert json.loads((tmp_path / "a.json").read_text()) == {"fold": 0}
