"""DICOM SEG: round trips, what other readers find in it, and what is refused."""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import OBLIQUE, PATIENT_ID, PATIENT_NAME, make_mask, write_ct

from lungkit.data import read_dicom_seg, read_series, read_volume, write_dicom_seg
from lungkit.data.dicom import DicomScan
from lungkit.data.dicom.slices import LPS_TO_RAS
from lungkit.errors import DataError, ResourceError, UsageError

LABELS = {"tumour": 1, "lung": 2}


@pytest.fixture
def scan(tmp_path: Path) -> DicomScan:
    write_ct(tmp_path / "ct")
    return read_series(tmp_path / "ct")


@pytest.mark.parametrize("geometry", [{}, {"orientation": OBLIQUE}, {"tilt_degrees": 0.4}])
def test_a_mask_written_and_read_is_the_same(tmp_path: Path, geometry: dict[str, Any]) -> None:
    write_ct(tmp_path / "ct", **geometry)
    scan = read_series(tmp_path / "ct")
    write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), LABELS)
    mask, labels = read_dicom_seg(tmp_path / "seg.dcm", scan)
    assert labels == LABELS
    np.testing.assert_array_equal(mask.array, make_mask())
    np.testing.assert_array_equal(mask.affine, scan.volume.affine)


def test_a_real_mask_written_and_read_is_the_same(real_data: Path, tmp_path: Path) -> None:
    scan = read_series(real_data / "dicom_pat4")
    expected = read_volume(real_data / "nsclc_ct" / "labelsTr" / "nsclc_pat4.nii.gz").array
    write_dicom_seg(tmp_path / "seg.dcm", scan, expected, {"tumour": 1})
    np.testing.assert_array_equal(read_dicom_seg(tmp_path / "seg.dcm", scan)[0].array, expected)


def test_highdicom_finds_the_same_voxels_at_the_same_place(tmp_path: Path) -> None:
    import highdicom

    write_ct(tmp_path / "ct", orientation=OBLIQUE)
    scan = read_series(tmp_path / "ct")
    write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), LABELS)
    found = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    for value in LABELS.values():
        theirs = np.argwhere(found.array == value) @ found.affine[:3, :3].T + found.affine[:3, 3]
        affine = LPS_TO_RAS @ scan.volume.affine
        ours = np.argwhere(make_mask() == value) @ affine[:3, :3].T + affine[:3, 3]
        assert sorted(map(tuple, np.round(theirs, 4))) == sorted(map(tuple, np.round(ours, 4)))


def test_pydicom_finds_one_frame_for_each_slice_of_each_segment(scan: DicomScan, tmp_path: Path) -> None:
    import pydicom

    write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), LABELS)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    mask, pixels, seen = make_mask(), dataset.pixel_array, []
    for frame, groups in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        k = int(source.rpartition(".")[2]) - 1
        np.testing.assert_array_equal(frame, (mask == number)[:, :, k].T)
        seen.append((number, k))
    assert sorted(seen) == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4), (2, 5)]


def test_segments_are_coded_and_say_what_made_them(scan: DicomScan, tmp_path: Path) -> None:
    import pydicom

    labels = {"GTV": 1, "lung": 2, "nodule": 3, "heart": 4}
    write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), labels, algorithm="attention-unet", version="7")
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    kinds = [item.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for item in dataset.SegmentSequence]
    assert kinds == ["Neoplasm", "Lung", "Nodule", "Tissue"]
    regions = [item.get("AnatomicRegionSequence") for item in dataset.SegmentSequence]
    assert [region and region[0].CodeMeaning for region in regions] == ["Lung", None, "Lung", None]
    made = dataset.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (made.AlgorithmName, made.AlgorithmVersion) == ("attention-unet", "7")
    assert dataset.SegmentSequence[0].SegmentAlgorithmType == "AUTOMATIC"
    assert (dataset.SegmentationType, dataset.PatientName, dataset.PatientID) == (
        "BINARY",
        PATIENT_NAME,
        PATIENT_ID,
    )


@pytest.mark.parametrize("factor", [7, 425])
def test_values_with_gaps_become_segments_in_order_of_value(
    scan: DicomScan, tmp_path: Path, factor: int
) -> None:
    mask = make_mask().astype(np.uint16) * factor
    write_dicom_seg(tmp_path / "seg.dcm", scan, mask, {"b": 2 * factor, "a": factor})
    found, labels = read_dicom_seg(tmp_path / "seg.dcm", scan)
    assert labels == {"a": 1, "b": 2}
    np.testing.assert_array_equal(found.array, make_mask())


def test_an_empty_mask_is_written_and_read(scan: DicomScan, tmp_path: Path) -> None:
    write_dicom_seg(tmp_path / "seg.dcm", scan, np.zeros((12, 10, 6), np.uint8), {"tumour": 1})
    mask, labels = read_dicom_seg(tmp_path / "seg.dcm", scan)
    assert labels == {"tumour": 1}
    assert not mask.array.any()


def test_segments_can_be_chosen_by_label(scan: DicomScan, tmp_path: Path) -> None:
    write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), LABELS)
    mask, labels = read_dicom_seg(tmp_path / "seg.dcm", scan, segment=["lung"])
    assert labels == {"lung": 1}
    np.testing.assert_array_equal(mask.array, make_mask() == 2)
    with pytest.raises(DataError, match="no segment 'heart'; it holds 'tumour', 'lung'"):
        read_dicom_seg(tmp_path / "seg.dcm", scan, segment="heart")


def foreign_seg(path: Path, scan: DicomScan, pixels: np.ndarray, kind: str, **options: Any) -> None:
    """A SEG by highdicom itself, in a form that lungkit reads but does not write."""
    import highdicom
    from pydicom.sr.codedict import codes

    described = [
        highdicom.seg.SegmentDescription(number, name, codes.SCT.Tissue, codes.SCT.Tissue, "MANUAL")
        for number, name in enumerate(LABELS, start=1)
    ]
    highdicom.seg.Segmentation(
        list(scan.headers), pixels, kind, described, highdicom.UID(), 1, highdicom.UID(), 1, "m", "m", "1", "1",
        **options,
    ).save_as(path)  # fmt: skip


def test_a_label_map_segmentation_is_read(scan: DicomScan, tmp_path: Path) -> None:
    foreign_seg(tmp_path / "seg.dcm", scan, make_mask().T.copy(), "LABELMAP")
    mask, labels = read_dicom_seg(tmp_path / "seg.dcm", scan)
    assert labels == LABELS
    np.testing.assert_array_equal(mask.array, make_mask())


def test_overlapping_segments_are_refused_unless_one_is_named(scan: DicomScan, tmp_path: Path) -> None:
    both = np.stack([make_mask().T == 1, make_mask().T > 0], axis=-1).astype(np.uint8)
    foreign_seg(tmp_path / "seg.dcm", scan, both, "BINARY")
    with pytest.raises(DataError, match=r"'tumour' and 'lung' overlap.*segment='lung'"):
        read_dicom_seg(tmp_path / "seg.dcm", scan)
    np.testing.assert_array_equal(
        read_dicom_seg(tmp_path / "seg.dcm", scan, segment="lung")[0].array, make_mask() > 0
    )


def test_frames_cropped_to_the_mask_are_put_where_they_belong(scan: DicomScan, tmp_path: Path) -> None:
    import highdicom

    affine = (LPS_TO_RAS @ scan.volume.affine)[:, [2, 1, 0, 3]]
    affine[:3, 3] += affine[:3, 1] * 2 + affine[:3, 2] * 3
    part = highdicom.Volume(
        make_mask().T[:, 2:9, 3:11].copy(),
        affine,
        coordinate_system="PATIENT",
        frame_of_reference_uid="1.2.3.99",
    )
    foreign_seg(tmp_path / "seg.dcm", scan, part, "BINARY")
    expected = np.zeros_like(make_mask())
    expected[3:11, 2:9] = make_mask()[3:11, 2:9]
    np.testing.assert_array_equal(read_dicom_seg(tmp_path / "seg.dcm", scan)[0].array, expected)


def test_a_fractional_segmentation_is_refused(scan: DicomScan, tmp_path: Path) -> None:
    foreign_seg(tmp_path / "seg.dcm", scan, make_mask().T.copy(), "FRACTIONAL")
    with pytest.raises(DataError, match="FRACTIONAL segmentation is not supported; threshold it"):
        read_dicom_seg(tmp_path / "seg.dcm", scan)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"origin": (-50.0, -60.0, 200.0)}, "does not lie on the scan's grid"),
        ({"origin": (-49.6, -60.0, 100.0)}, "does not lie on the scan's grid"),
        ({"spacing": (0.71, 0.9)}, "does not lie on the scan's grid"),
        ({"edit": lambda dataset, k: setattr(dataset, "FrameOfReferenceUID", "1.2.9")}, "frame of reference"),
    ],
)
def test_a_mask_of_another_scan_is_refused(
    scan: DicomScan, tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    write_ct(tmp_path / "other", **other)
    write_dicom_seg(tmp_path / "seg.dcm", read_series(tmp_path / "other"), make_mask(), LABELS)
    with pytest.raises(DataError, match=message):
        read_dicom_seg(tmp_path / "seg.dcm", scan)


def test_a_damaged_segmentation_is_a_data_error_and_never_another(scan: DicomScan, tmp_path: Path) -> None:
    write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), LABELS)
    content, refused = (tmp_path / "seg.dcm").read_bytes(), 0
    for position in np.random.default_rng(0).integers(128, len(content), 120):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        (tmp_path / "seg.dcm").write_bytes(damaged if position % 8 else damaged[:position])
        try:
            read_dicom_seg(tmp_path / "seg.dcm", scan)
        except DataError as error:
            refused += 1
            assert str(error).startswith("seg.dcm: ")
    assert refused > 20


def test_attributes_that_dicom_forbids_are_emptied_and_never_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import pydicom

    def edit(dataset: Any, k: int) -> None:
        # A name in one part makes highdicom warn, with the name in the text.
        dataset.PatientName, dataset.PatientSex, dataset.StudyTime = "Doe Jane", "U", "Doe Jane"
        dataset.StudyDescription, dataset.PatientAge = "Doe Jane " * 20, "Doe"
        del dataset.AccessionNumber

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_ct(tmp_path / "ct", edit=edit)
    scan = read_series(tmp_path / "ct")
    caplog.clear()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), LABELS)
    assert "Doe" not in caplog.text
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (dataset.PatientName, dataset.PatientSex, dataset.AccessionNumber) == ("Doe Jane", "", "")


def test_a_full_disk_leaves_nothing_behind(
    scan: DicomScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import highdicom

    def full(self: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(ResourceError, match=r"seg\.dcm: not written, the disk or quota is full"):
        write_dicom_seg(tmp_path / "out" / "seg.dcm", scan, make_mask(), LABELS)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_highdicom_the_error_says_what_to_install(
    scan: DicomScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(UsageError, match=r"pip install 'lungkit\[dicom\]'"):
        write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), LABELS)
