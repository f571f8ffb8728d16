"""Which scans a path holds."""

from __future__ import annotations

import numpy as np
import pytest

from lungkit.data import write_nifti
from lungkit.errors import DataError, UsageError
from lungkit.pipeline import find_scans, share_of


@pytest.fixture
def touch(tmp_path):
    def build(*names: str, content: bytes = b"x"):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path

    return build


def test_a_folder_of_nifti_files_is_sorted_and_other_files_are_left(touch):
    folder = touch("b.nii.gz", "a.nii", "notes.txt", ".hidden.nii.gz")
    assert [(scan.name, len(scan.paths)) for scan in find_scans(folder)] == [("a", 1), ("b", 1)]


def test_numbered_files_are_the_channels_of_one_scan(touch):
    folder = touch("p1_0001.nii.gz", "p1_0000.nii.gz", "p2_0000.nii.gz")
    found = {scan.name: [path.name for path in scan.paths] for scan in find_scans(folder, channels=2)}
    assert found == {"p1": ["p1_0000.nii.gz", "p1_0001.nii.gz"], "p2": ["p2_0000.nii.gz"]}


def test_the_first_channel_stands_for_the_scan(touch):
    folder = touch("p1_0001.nii.gz", "p1_0000.nii.gz")
    (one,) = find_scans(folder / "p1_0000.nii.gz", channels=1)
    (two,) = find_scans(folder / "p1_0000.nii.gz", channels=2)
    assert (one.name, len(one.paths), len(two.paths)) == ("p1", 1, 2)


def test_dicom_folders_are_known_by_their_files(touch):
    folder = touch("p1/IM1", "p1/IM2", "p2/IM1", "none/readme.txt", content=b"\0" * 128 + b"DICM")
    (folder / "none" / "readme.txt").write_text("no scan")
    assert [(scan.name, scan.is_dicom) for scan in find_scans(folder)] == [("p1", True), ("p2", True)]
    assert [scan.name for scan in find_scans(folder / "p1")] == ["p1"]


@pytest.mark.parametrize(
    ("names", "path", "error", "message"),
    [
        ((), "absent", DataError, "no such file or folder"),
        (("notes.txt",), ".", DataError, "no scan found"),
        (("scan.png",), "scan.png", DataError, "not a NIfTI file"),
        (("a.nii", "a.nii.gz"), ".", UsageError, "both be written as 'a'"),
        (("a.nii", "a_0000.nii"), ".", UsageError, "both be written as 'a'"),
    ],
)
def test_paths_without_a_scan_are_named(touch, names, path, error, message):
    folder = touch(*names)
    with pytest.raises(error, match=message):
        find_scans(folder / path)


def test_series_are_for_dicom(touch):
    with pytest.raises(UsageError, match="chooses among DICOM series"):
        find_scans(touch("a.nii.gz"), series="1.2.3")


def test_a_replaced_file_has_another_fingerprint(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", np.zeros((4, 4, 4), np.int16), np.eye(4))
    (scan,) = find_scans(tmp_path)
    before = scan.fingerprint()
    assert scan.fingerprint() == before
    write_nifti(tmp_path / "a.nii.gz", np.ones((4, 4, 5), np.int16), np.eye(4))
    assert scan.fingerprint() != before


def test_shares_hold_every_scan_once(touch):
    scans = find_scans(touch(*(f"{name}.nii" for name in "abcdefg")))
    shares = [share_of(scans, index, 3) for index in range(3)]
    assert sorted(scan.name for share in shares for scan in share) == list("abcdefg")
    with pytest.raises(UsageError, match="shard 3/3"):
        share_of(scans, 3, 3)
