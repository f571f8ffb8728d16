"""Atomic writing: the old file or the whole new one, and nothing left behind."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from lungkit._atomic import atomic_path, claim_folder, new_folder, write_json_atomic, write_text_atomic
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


def test_a_claimed_folder_is_gone_on_in_for_the_same_purpose_only(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "out"
    claim_folder(folder, "made.json", {"seed": 0, "size": (2, 3)}, holds="phantoms")
    (folder / "first.txt").touch()
    claim_folder(folder, "made.json", {"seed": 0, "size": (2, 3)}, holds="phantoms")
    with pytest.raises(UsageError, match=r"holds phantoms made with other seed \(see made\.json there\)"):
        claim_folder(folder, "made.json", {"seed": 1, "size": (2, 3)}, holds="phantoms")
    claim_folder(folder, "made.json", {"seed": 1}, holds="phantoms", overwrite=True)
    assert json.loads((folder / "made.json").read_text()) == {"seed": 1}


@pytest.mark.parametrize("content", ["[1]", "null", '{"other": 1}'])
def test_a_record_of_another_form_is_no_claim(tmp_path: Path, content: str) -> None:
    (tmp_path / "made.json").write_text(content)
    with pytest.raises(UsageError, match="made with other"):
        claim_folder(tmp_path, "made.json", {"seed": 0}, holds="phantoms")


def test_a_folder_of_other_files_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not empty and holds no phantoms"):
        claim_folder(tmp_path, "made.json", {}, holds="phantoms")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".DS_Store", "thesis.tex"]


def test_a_folder_appears_with_its_record_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        claim_folder(tmp_path / "out", "made.json", {"seed": 0}, holds="phantoms")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_of_two_that_claim_a_folder_at_once_the_second_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    folder, exists = tmp_path / "out", Path.exists

    def absent_until_asked(path: Path) -> bool:
        there = exists(path)
        if path == folder and not there:
            monkeypatch.undo()
            claim_folder(folder, "made.json", {"seed": 0}, holds="phantoms")
        return there

    monkeypatch.setattr(Path, "exists", absent_until_asked)
    if seed == 0:
        claim_folder(folder, "made.json", {"seed": 0}, holds="phantoms")
    else:
        with pytest.raises(UsageError, match="made with other seed"):
            claim_folder(folder, "made.json", {"seed": 1}, holds="phantoms")
    assert json.loads((folder / "made.json").read_text()) == {"seed": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_folder_takes_the_first_name_that_is_free(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "theirs").touch()
    (tmp_path / "b").mkdir()
    with new_folder([tmp_path / "a", tmp_path / "b"]) as new:
        (new.path / "ours").touch()
        assert not any((tmp_path / "b").iterdir())
    assert new.path == tmp_path / "b" and (tmp_path / "b" / "ours").exists()


def test_a_new_folder_whose_name_was_taken_meanwhile_is_an_error_and_gone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an empty folder"), new_folder([tmp_path / "a"]):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_current_folder_can_be_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(["."]) as new:
        (new.path / "ours").touch()
    assert [path.name for path in Path.cwd().iterdir()] == ["ours"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_names_as_long_as_a_file_system_takes_are_written(tmp_path: Path) -> None:
    name = "ä" * 120 + ".nii.gz"
    write_text_atomic(tmp_path / name, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]
