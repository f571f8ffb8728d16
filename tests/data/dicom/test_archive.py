"""What a tree of DICOM folders holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from dicom_cases import change, files, make_mask, write_ct

from lungkit.data import read_series, write_dicom_seg, write_rtstruct
from lungkit.data.dicom.archive import find_archive


def test_masks_are_found_with_the_series_that_they_were_made_on(tmp_path: Path) -> None:
    for number in (1, 2):
        write_ct(tmp_path / "patient" / "study" / f"ct{number}", series=number)
    scan = read_series(tmp_path / "patient" / "study" / "ct2")
    (tmp_path / "patient" / "masks").mkdir()
    write_rtstruct(tmp_path / "patient" / "masks" / "rs.dcm", scan, make_mask(), {"GTV": 1, "node": 2})
    write_dicom_seg(tmp_path / "patient" / "masks" / "seg.dcm", scan, make_mask(), {"GTV": 1, "node": 2})
    (tmp_path / "README").write_text("not DICOM")
    archive = find_archive(tmp_path)
    assert [found.folder.name for found in archive.series] == ["ct1", "ct2"]
    assert {mask.kind: mask.structures for mask in archive.masks} == {
        "rtstruct": ("GTV", "node"),
        "seg": ("GTV", "node"),
    }
    assert [[found.folder.name for found in archive.series_of(mask)] for mask in archive.masks] == [
        ["ct2"]
    ] * 2
    assert not archive.problems and not archive.others


def test_a_mask_that_names_no_series_belongs_to_its_frame_of_reference(tmp_path: Path) -> None:
    import pydicom

    write_ct(tmp_path / "ct")
    write_ct(tmp_path / "other", series=2, edit=change(FrameOfReferenceUID="1.2.3.98"))
    write_rtstruct(tmp_path / "rs.dcm", read_series(tmp_path / "ct"), make_mask(), {"a": 1, "b": 2})
    dataset = pydicom.dcmread(tmp_path / "rs.dcm")
    del dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    dataset.save_as(tmp_path / "rs.dcm")
    archive = find_archive(tmp_path)
    assert [found.folder.name for found in archive.series_of(archive.masks[0])] == ["ct"]


def test_a_series_beside_a_damaged_file_and_one_that_is_there_twice_are_named(tmp_path: Path) -> None:
    write_ct(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_ct(tmp_path / "c", series=2)
    damaged = files(tmp_path / "c")[-1]
    damaged.write_bytes(damaged.read_bytes()[:140])
    archive = find_archive(tmp_path)
    assert [found.folder.name for found in archive.series] == ["a"]
    assert "another folder holds" in archive.problems[tmp_path / "b"]
    assert damaged.name in archive.problems[tmp_path / "c"] and damaged in archive.problems


def test_scans_of_other_modalities_are_counted(tmp_path: Path) -> None:
    write_ct(tmp_path / "pet", edit=change(Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128"))
    write_ct(tmp_path / "scout", series=2, edit=change(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    archive = find_archive(tmp_path)
    assert not archive.series
    assert archive.others == {"PT series": 1, "objects that are no scans": 6}


def test_patients_are_told_apart_without_an_id(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_ct(
            tmp_path / str(number),
            np.zeros((4, 4, 3), np.int16),
            series=number,
            edit=change(PatientID="", StudyInstanceUID=f"1.2.{min(number, 2)}"),
        )
    first, second, third = find_archive(tmp_path).series
    assert first.patient != second.patient == third.patient
    assert "study" not in repr(first)  # nothing of the patient in a log
