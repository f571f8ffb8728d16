from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from pathlib import Path

import pytest

from lungkit.data import (
    CaseCache,
    fingerprint_dataset,
    open_dataset,
    plan_preprocessing,
    write_phantom_dataset,
)
from lungkit.data import cache_folder as module
from lungkit.data.cache_folder import cache_use, default_cache_folder, prune_cache


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Temporary files of the test's own, and nothing remembered of other tests."""
    module._writable_folder.cache_clear()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return temporary


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "xdg" / "lungkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_folder() == tmp_path / "home" / ".cache" / "lungkit"


def no_home(monkeypatch, tmp_path):
    def missing() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", missing)


def home_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))


def read_only(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def refused(dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)


@pytest.mark.parametrize("arrange", [no_home, home_is_a_file, read_only])
def test_without_a_writable_home_the_cache_is_temporary_and_that_is_said_once(
    monkeypatch, tmp_path, fresh, caplog, arrange
):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    arrange(monkeypatch, tmp_path)
    folder = default_cache_folder()
    assert default_cache_folder() == folder and folder.parent == fresh
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(caplog.records) == 1
    assert str(folder) in caplog.text and "--data.cache or XDG_CACHE_HOME" in caplog.text


def test_a_temporary_cache_is_not_shared_with_whoever_took_its_name(monkeypatch, tmp_path, fresh):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    no_home(monkeypatch, tmp_path)
    (tmp_path / "theirs").mkdir()
    (fresh / f"lungkit-{os.getuid()}").symlink_to(tmp_path / "theirs")
    folder = default_cache_folder()
    assert folder.parent == fresh and folder.name != f"lungkit-{os.getuid()}" and not folder.is_symlink()


def test_pruning_removes_the_cases_that_no_run_opened_lately(tmp_path):
    dataset = open_dataset(write_phantom_dataset(tmp_path / "data", cases=3, shape=(4, 32, 32), dims=3))
    names = [case.case_id for case in dataset.cases]
    plan = plan_preprocessing(fingerprint_dataset(dataset, names))
    cache = CaseCache(tmp_path / "cache" / "cases", dataset, plan)
    cases = cache.prepare_all(names)
    before = cache_use(tmp_path / "cache")
    assert before.cases == 3
    for case in cases[:2]:
        old = time.time() - 40 * 24 * 3600
        os.utime(case.directory / "case.json", (old, old))
    cache.prepare(names[1])  # opened again: in use
    removed = prune_cache(tmp_path / "cache", unused_days=30)
    assert removed.cases == 1 and not cases[0].directory.exists() and cases[1].directory.exists()
    assert cache_use(tmp_path / "cache") == (2, before.bytes - removed.bytes)
    assert cache.prepare(names[0]).image.shape == cases[1].image.shape
