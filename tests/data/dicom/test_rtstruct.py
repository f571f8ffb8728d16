"""RT Structure Sets: real contours, round trips, and what is refused."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import OBLIQUE, PATIENT_ID, PATIENT_NAME, make_mask, write_ct

from lungkit.data import read_rtstruct, read_series, read_volume, write_rtstruct
from lungkit.data.dicom import DicomScan
from lungkit.errors import DataError, ResourceError, UsageError

LABELS = {"tumour": 1, "lymph node": 2}


@pytest.fixture
def scan(tmp_path: Path) -> DicomScan:
    write_ct(tmp_path / "ct")
    return read_series(tmp_path / "ct")


def rewrite(path: Path, edit: Callable[[Any], None]) -> None:
    """Change a DICOM file."""
    import pydicom

    dataset = pydicom.dcmread(path)
    edit(dataset)
    dataset.save_as(path)


def move(points: Any, *, by: tuple[float, float, float]) -> list[float]:
    """Contour data, shifted in mm."""
    return (np.array(points, float).reshape(-1, 3) + by).ravel().tolist()


def test_real_contours_fill_to_the_real_mask(real_data: Path) -> None:
    scan = read_series(real_data / "dicom_pat4")
    mask, labels = read_rtstruct(real_data / "dicom_pat4" / "DCM_RS_00056.dcm", scan)
    expected = read_volume(real_data / "nsclc_ct" / "labelsTr" / "nsclc_pat4.nii.gz")
    assert labels == {"GTV-1": 1}
    np.testing.assert_array_equal(mask.array, expected.array)
    np.testing.assert_allclose(mask.affine, expected.affine, atol=1e-6)


@pytest.mark.parametrize("geometry", [{}, {"orientation": OBLIQUE}, {"tilt_degrees": 0.4}])
def test_a_mask_written_and_read_is_the_same(tmp_path: Path, geometry: dict[str, Any]) -> None:
    write_ct(tmp_path / "ct", **geometry)
    scan = read_series(tmp_path / "ct")
    write_rtstruct(tmp_path / "rt.dcm", scan, make_mask(), LABELS)
    mask, labels = read_rtstruct(tmp_path / "rt.dcm", scan)
    assert labels == LABELS
    np.testing.assert_array_equal(mask.array, make_mask())


def test_a_real_mask_written_and_read_is_the_same(real_data: Path, tmp_path: Path) -> None:
    scan = read_series(real_data / "dicom_pat4")
    expected = read_volume(real_data / "nsclc_ct" / "labelsTr" / "nsclc_pat4.nii.gz").array
    write_rtstruct(tmp_path / "rt.dcm", scan, expected, {"tumour": 1})
    np.testing.assert_array_equal(read_rtstruct(tmp_path / "rt.dcm", scan)[0].array, expected)


def test_contours_lie_on_voxel_edges_and_name_their_slice(scan: DicomScan, tmp_path: Path) -> None:
    import pydicom

    mask = np.zeros(scan.volume.array.shape, np.uint8)
    mask[2, 3, 4] = 1
    write_rtstruct(tmp_path / "rt.dcm", scan, mask, {"tumour": 1})
    dataset = pydicom.dcmread(tmp_path / "rt.dcm")
    (contour,) = dataset.ROIContourSequence[0].ContourSequence
    corners = {
        (float(x), float(y)) for x, y in zip(contour.ContourData[::3], contour.ContourData[1::3], strict=True)
    }
    assert corners == {(-48.65, -58.25), (-47.75, -58.25), (-47.75, -57.55), (-48.65, -57.55)}
    assert {float(z) for z in contour.ContourData[2::3]} == {110.0}
    assert contour.ContourImageSequence[0].ReferencedSOPInstanceUID == "1.2.3.1.5"
    assert contour.ContourGeometricType == "CLOSED_PLANAR"
    series = (
        dataset.ReferencedFrameOfReferenceSequence[0]
        .RTReferencedStudySequence[0]
        .RTReferencedSeriesSequence[0]
    )
    assert series.SeriesInstanceUID == "1.2.3.1"
    assert len(series.ContourImageSequence) == 6
    assert dataset.FrameOfReferenceUID == "1.2.3.99"


def test_patient_and_study_come_from_the_source(scan: DicomScan, tmp_path: Path) -> None:
    import pydicom

    write_rtstruct(tmp_path / "rt.dcm", scan, make_mask(), LABELS)
    dataset = pydicom.dcmread(tmp_path / "rt.dcm")
    assert (dataset.PatientName, dataset.PatientID, dataset.StudyInstanceUID) == (
        PATIENT_NAME,
        PATIENT_ID,
        "1.2.3",
    )
    assert dataset.Modality == "RTSTRUCT"
    assert dataset.SeriesInstanceUID not in ("1.2.3.1", dataset.SOPInstanceUID)
    assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID


def test_a_name_without_voxels_stays_as_an_empty_structure(scan: DicomScan, tmp_path: Path) -> None:
    empty = np.zeros(scan.volume.array.shape, np.uint8)
    write_rtstruct(tmp_path / "rt.dcm", scan, empty, LABELS)
    mask, labels = read_rtstruct(tmp_path / "rt.dcm", scan)
    assert labels == LABELS
    assert not mask.array.any()


def test_structures_can_be_chosen_by_name(scan: DicomScan, tmp_path: Path) -> None:
    write_rtstruct(tmp_path / "rt.dcm", scan, make_mask(), LABELS)
    mask, labels = read_rtstruct(tmp_path / "rt.dcm", scan, roi="lymph node")
    assert labels == {"lymph node": 1}
    np.testing.assert_array_equal(mask.array, make_mask() == 2)
    with pytest.raises(DataError, match="no structure 'GTV'; it holds 'tumour', 'lymph node'"):
        read_rtstruct(tmp_path / "rt.dcm", scan, roi="GTV")


def test_overlapping_structures_are_refused_unless_one_is_named(scan: DicomScan, tmp_path: Path) -> None:
    write_rtstruct(tmp_path / "rt.dcm", scan, make_mask(), LABELS)

    def overlap(dataset: Any) -> None:
        first, second = dataset.ROIContourSequence
        second.ContourSequence = first.ContourSequence

    rewrite(tmp_path / "rt.dcm", overlap)
    with pytest.raises(DataError, match=r"'tumour' and 'lymph node' overlap.*roi='lymph node'"):
        read_rtstruct(tmp_path / "rt.dcm", scan)
    np.testing.assert_array_equal(
        read_rtstruct(tmp_path / "rt.dcm", scan, roi="tumour")[0].array, make_mask() == 1
    )


def test_an_isocentre_is_no_structure_of_the_mask(scan: DicomScan, tmp_path: Path) -> None:
    write_rtstruct(tmp_path / "rt.dcm", scan, make_mask(), LABELS)

    def point(dataset: Any) -> None:
        contour = dataset.ROIContourSequence[1].ContourSequence[0]
        contour.ContourGeometricType, contour.ContourData = "POINT", list(contour.ContourData[:3])
        dataset.ROIContourSequence[1].ContourSequence = [contour]

    rewrite(tmp_path / "rt.dcm", point)
    assert read_rtstruct(tmp_path / "rt.dcm", scan)[1] == {"tumour": 1}
    with pytest.raises(DataError, match="structure 'lymph node': a contour is POINT, not closed"):
        read_rtstruct(tmp_path / "rt.dcm", scan, roi="lymph node")


@pytest.mark.parametrize("by", [(0, 0, 100.0), (500.0, 0, 0)])
def test_contours_off_the_grid_are_named(
    scan: DicomScan, tmp_path: Path, by: tuple[float, float, float]
) -> None:
    write_rtstruct(tmp_path / "rt.dcm", scan, make_mask(), LABELS)

    def away(dataset: Any) -> None:
        contour = dataset.ROIContourSequence[0].ContourSequence[0]
        contour.ContourData = move(contour.ContourData, by=by)

    rewrite(tmp_path / "rt.dcm", away)
    with pytest.raises(DataError, match=r"structure 'tumour': 1 contours lie outside the scan, at \(.*\) mm"):
        read_rtstruct(tmp_path / "rt.dcm", scan)


def test_contours_between_slices_go_to_the_nearest_and_do_not_cancel(
    scan: DicomScan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import copy

    write_rtstruct(tmp_path / "rt.dcm", scan, make_mask(), {"tumour": 1, "other": 2})

    def add_planes(dataset: Any) -> None:
        contours = dataset.ROIContourSequence[1].ContourSequence
        for contour in list(contours):
            between = copy.deepcopy(contour)
            between.ContourData = move(contour.ContourData, by=(0, 0, 1.0))  # slices are 2.5 mm apart
            contours.append(between)
        contours.append(copy.deepcopy(contours[0]))  # the very same contour again

    rewrite(tmp_path / "rt.dcm", add_planes)
    with caplog.at_level(logging.WARNING, "lungkit"):
        mask, _ = read_rtstruct(tmp_path / "rt.dcm", scan)
    np.testing.assert_array_equal(mask.array, make_mask())
    assert "4 contours lie between slices and were left out" in caplog.text


def test_contours_on_every_second_slice_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_ct(tmp_path / "ct")
    scan = read_series(tmp_path / "ct")
    mask = np.zeros(scan.volume.array.shape, np.uint8)
    mask[2:5, 2:5, ::2] = 1
    write_rtstruct(tmp_path / "rt.dcm", scan, mask, {"tumour": 1})
    with caplog.at_level(logging.WARNING, "lungkit"):
        np.testing.assert_array_equal(read_rtstruct(tmp_path / "rt.dcm", scan)[0].array, mask)
    assert "rt.dcm, structure 'tumour': contours on every 2 slices only" in caplog.text


def test_structures_of_one_name_share_a_value(scan: DicomScan, tmp_path: Path) -> None:
    write_rtstruct(tmp_path / "rt.dcm", scan, make_mask(), LABELS)

    def rename(dataset: Any) -> None:
        for structure in dataset.StructureSetROISequence:
            structure.ROIName = "nodule"

    rewrite(tmp_path / "rt.dcm", rename)
    mask, labels = read_rtstruct(tmp_path / "rt.dcm", scan)
    assert labels == {"nodule": 1}
    np.testing.assert_array_equal(mask.array, make_mask() > 0)


def test_contours_across_the_slices_are_refused(scan: DicomScan, tmp_path: Path) -> None:
    write_rtstruct(tmp_path / "rt.dcm", scan, make_mask(), LABELS)

    def turn(dataset: Any) -> None:
        points = np.array(dataset.ROIContourSequence[0].ContourSequence[0].ContourData, float).reshape(-1, 3)
        points[:2, 2] += 5
        dataset.ROIContourSequence[0].ContourSequence[0].ContourData = points.ravel().tolist()

    rewrite(tmp_path / "rt.dcm", turn)
    with pytest.raises(DataError, match="not parallel to the slices"):
        read_rtstruct(tmp_path / "rt.dcm", scan)


def test_another_frame_of_reference_is_refused(scan: DicomScan, tmp_path: Path) -> None:
    write_rtstruct(tmp_path / "rt.dcm", scan, make_mask(), LABELS)

    def elsewhere(dataset: Any) -> None:
        dataset.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.3.4.5"

    rewrite(tmp_path / "rt.dcm", elsewhere)
    with pytest.raises(DataError, match="another frame of reference"):
        read_rtstruct(tmp_path / "rt.dcm", scan)


def test_a_full_disk_leaves_nothing_behind(
    scan: DicomScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pydicom

    def full(self: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pydicom.Dataset, "save_as", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(ResourceError, match=r"rt\.dcm: not written, the disk or quota is full"):
        write_rtstruct(tmp_path / "out" / "rt.dcm", scan, make_mask(), LABELS)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("mask", "labels", "message"),
    [
        (np.zeros((2, 2, 2), np.uint8), LABELS, r"uint8 of shape \(2, 2, 2\), expected .*\(12, 10, 6\)"),
        (make_mask().astype(np.float32), LABELS, "float32"),
        (make_mask(), {"tumour": 1}, r"values \[2\] have no name"),
        (make_mask(), {"tumour": 1, "node": 1}, "one value to several names"),
        (make_mask(), {"tumour": 1, "node": 70000}, "from 1 to 65535"),
        (make_mask(), {"a\\b": 1, "node": 2}, "cannot name a segment"),
        (make_mask(), {}, "0 names"),
    ],
)
def test_masks_and_labels_that_do_not_fit_are_refused(
    scan: DicomScan, tmp_path: Path, mask: np.ndarray, labels: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_rtstruct(tmp_path / "rt.dcm", scan, mask, labels)
