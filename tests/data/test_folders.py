"""Folders at any depth."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lungkit.data.folders import walk_folders


def test_links_that_go_round_in_circles_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "linked").symlink_to(tmp_path / "a" / "b")
    (tmp_path / ".hidden").mkdir()
    found = [(str(folder.relative_to(tmp_path)), [path.name for path in files])
             for folder, files in walk_folders(tmp_path, unreadable=pytest.fail)]  # fmt: skip
    assert found == [(".", []), ("a", []), (str(Path("a") / "b"), ["file"])]


def test_a_folder_that_cannot_be_listed_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("os.scandir", refuse)
    refused: list[tuple[str, str | None]] = []
    walked = walk_folders(
        tmp_path, unreadable=lambda folder, error: refused.append((folder.name, error.strerror))
    )
    assert [folder.name for folder, _ in walked][1:] == ["a", "c"]
    assert refused == [("b", "Permission denied")]
