"""Small files from elsewhere: bounded in size and depth, and never a pipe or a device."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lungkit._reading import check_regular, read_bytes, read_json, read_text


def test_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": [1,\r\n 2]}')
    assert read_json(path) == {"a": [1, 2]}
    assert read_text(path) == '{"a": [1,\n 2]}'
    assert check_regular(path) == len(read_bytes(path)) == 15


@pytest.mark.parametrize("read", [check_regular, read_bytes, read_text, read_json])
def test_a_pipe_a_device_and_a_folder_are_not_read(tmp_path: Path, read) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zeros", "folder"):
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            read(tmp_path / name)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole that takes no room
    with pytest.raises(ValueError, match=r"large\.json has 1099511627776 bytes, more than the 67108864"):
        read_json(path)


@pytest.mark.parametrize("depth", [65, 1000, 200_000])
def test_a_deep_file_is_an_error_in_words(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * depth + "]" * depth)
    with pytest.raises(ValueError, match="nested more than 64 levels deep"):
        read_json(path)
    path.write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(ValueError, match="nested more than 64 levels deep"):
        read_json(path)


def test_depth_that_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 64 + "]" * 64)
    assert json.dumps(read_json(path)).count("[") == 64
