"""Remembered hashes are used only for files that are what they were."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lungkit.data import source_hash
from lungkit.data.source_hash import SourceHashes
from lungkit.errors import DataError


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(source_hash, "SETTLED_NS", -1)  # as if the file were old
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"voxels")
    return path


@pytest.fixture
def hashes(tmp_path: Path) -> SourceHashes:
    return SourceHashes(tmp_path / "sources")


def hash_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def test_hash_is_that_of_the_contents(source: Path, hashes: SourceHashes) -> None:
    assert hashes.of(source) == hash_of(b"voxels")


def test_unchanged_file_is_not_read_again(source: Path, hashes: SourceHashes, tmp_path: Path) -> None:
    hashes.of(source)
    record = next((tmp_path / "sources").iterdir())
    record.write_text(record.read_text().replace(hash_of(b"voxels"), "remembered"))
    assert hashes.of(source) == "remembered"


def test_changed_contents_of_the_same_size_and_time_are_seen(source: Path, hashes: SourceHashes) -> None:
    status = source.stat()
    hashes.of(source)
    source.write_bytes(b"VOXELS")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))  # the change time cannot be set back
    assert hashes.of(source) == hash_of(b"VOXELS")


def test_fresh_file_is_not_remembered(tmp_path: Path, hashes: SourceHashes) -> None:
    path = tmp_path / "fresh.nii.gz"
    path.write_bytes(b"voxels")
    assert hashes.of(path) == hash_of(b"voxels")
    assert list((tmp_path / "sources").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_broken_record_is_ignored(source: Path, hashes: SourceHashes, tmp_path: Path, content: bytes) -> None:
    hashes.of(source)
    next((tmp_path / "sources").iterdir()).write_bytes(content)
    assert hashes.of(source) == hash_of(b"voxels")


def test_absent_file_is_a_data_error(hashes: SourceHashes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.nii: cannot be read"):
        hashes.of(tmp_path / "absent.nii")
