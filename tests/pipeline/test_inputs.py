"""Which scans a path holds."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from dicom_cases import make_mask, write_ct

from lungkit.data import NanPolicy, read_series, write_nifti, write_rtstruct
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
    assert [(scan.name, len(scan.paths)) for scan in find_scans(folder).scans] == [("a", 1), ("b", 1)]


def test_numbered_files_are_the_channels_of_one_scan(touch):
    folder = touch("p1_0001.nii.gz", "p1_0000.nii.gz", "p2_0000.nii.gz")
    found = {scan.name: [path.name for path in scan.paths] for scan in find_scans(folder, channels=2).scans}
    assert found == {"p1": ["p1_0000.nii.gz", "p1_0001.nii.gz"], "p2": ["p2_0000.nii.gz"]}


def test_the_first_channel_stands_for_the_scan(touch):
    folder = touch("p1_0001.nii.gz", "p1_0000.nii.gz")
    (one,) = find_scans(folder / "p1_0000.nii.gz", channels=1).scans
    (two,) = find_scans(folder / "p1_0000.nii.gz", channels=2).scans
    assert (one.name, len(one.paths), len(two.paths)) == ("p1", 1, 2)


def test_dicom_folders_are_known_by_their_files(touch):
    folder = touch("p1/IM1", "p1/IM2", "p2/IM1", "none/readme.txt", content=b"\0" * 128 + b"DICM")
    (folder / "none" / "readme.txt").write_text("no scan")
    assert [(scan.name, scan.is_dicom) for scan in find_scans(folder).scans] == [("p1", True), ("p2", True)]
    assert [scan.name for scan in find_scans(folder / "p1").scans] == ["p1"]


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
    (scan,) = find_scans(tmp_path).scans
    before = scan.fingerprint()
    assert scan.fingerprint() == before
    write_nifti(tmp_path / "a.nii.gz", np.ones((4, 4, 5), np.int16), np.eye(4))
    assert scan.fingerprint() != before


def test_shares_hold_every_scan_once(touch):
    scans = find_scans(touch(*(f"{name}.nii" for name in "abcdefg"))).scans
    shares = [share_of(scans, index, 3) for index in range(3)]
    assert sorted(scan.name for share in shares for scan in share) == list("abcdefg")
    with pytest.raises(UsageError, match="shard 3/3"):
        share_of(scans, 3, 3)


def names(found):
    return [scan.name for scan in found.scans]


def test_numbers_that_do_not_begin_at_0000_are_a_part_of_the_name(touch):
    folder = touch("patient_0001.nii.gz", "patient_0002.nii.gz", "p0_2019.nii.gz", "p1_0000.NII.GZ")
    assert names(find_scans(folder)) == ["p0_2019", "p1", "patient_0001", "patient_0002"]


def test_a_missing_channel_is_named_and_the_other_scans_go_on(touch):
    folder = touch("a_0000.nii", "a_0002.nii", "b_0000.nii", "b_0001.nii")
    found = find_scans(folder, channels=2)
    assert names(found) == ["b"]
    assert {path.name: reason for path, reason in found.passed_over.items()} == dict.fromkeys(
        ("a_0000.nii", "a_0002.nii"), "a channel of a, of which a_0001 is missing"
    )


DICOM = b"\0" * 128 + b"DICM"


def test_nifti_files_and_series_beside_each_other_are_all_scans(touch):
    touch("patientA/IM1", "patientB/IM1", "DICOMDIR", content=DICOM)
    found = find_scans(touch("extra.nii.gz"))
    assert names(found) == ["extra", "patientA", "patientB"] and not found.passed_over


def test_series_are_found_at_any_depth_under_names_of_their_own(touch):
    folder = touch("p1/study/ct/IM1", "p2/study/ct/IM1", "p2/study/lung/IM1", content=DICOM)
    assert names(find_scans(folder)) == ["lung", "p1_study_ct", "p2_study_ct"]


def test_folders_of_masks_are_no_scans(tmp_path):
    write_ct(tmp_path / "p" / "ct")
    (tmp_path / "p" / "masks").mkdir()
    labels = {"a": 1, "b": 2}
    write_rtstruct(
        tmp_path / "p" / "masks" / "rs.dcm", read_series(tmp_path / "p" / "ct"), make_mask(), labels
    )
    assert names(find_scans(tmp_path)) == ["ct"]


def test_what_cannot_be_used_is_named_and_the_rest_is_found(touch, monkeypatch):
    folder = touch("good.nii.gz", "series/IM1", "deep/other.nii.gz", "closed/IM1", content=DICOM)
    latin = Path(os.fsdecode(os.fsencode(folder) + b"/L\xe4sion.nii.gz"))
    latin.write_bytes(b"x")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    found = find_scans(folder)
    assert names(found) == ["good", "series"]
    assert found.passed_over.keys() == {latin, folder / "closed", folder / "deep" / "other.nii.gz"}
    assert "not UTF-8" in found.passed_over[latin]


def test_one_name_in_two_unicode_forms_is_one_name(touch):
    folder = touch(*(unicodedata.normalize(form, "Lä.nii.gz") for form in ("NFC", "NFD")))
    with pytest.raises(UsageError, match="both be written as 'Lä'"):
        find_scans(folder)


def test_voxels_that_are_no_numbers_are_replaced_on_request_only(tmp_path):
    array = np.full((4, 4, 4), 5, np.float32)
    array[0] = np.nan
    write_nifti(tmp_path / "a.nii.gz", array, np.eye(4))
    (scan,) = find_scans(tmp_path).scans
    with pytest.raises(DataError, match="--nan minimum"):
        scan.load()
    assert (scan.load(nan_policy=NanPolicy.MINIMUM).volumes[0].array == 5).all()
