"""DICOM structured reports: what highdicom and pydicom find in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dicom_cases import PATIENT_ID, change, make_mask, write_ct, write_enhanced_ct

from lungkit.data import read_series, write_dicom_seg
from lungkit.data.dicom import LesionMeasures, write_measurement_report
from lungkit.errors import DataError, UsageError

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (extra 'dicom')")
hd = pytest.importorskip("highdicom", reason="highdicom is not installed (extra 'dicom')")

LESIONS = [LesionMeasures(1.25, 15.5, 11.25, -38.5), LesionMeasures(0.5, 9.0, 7.0, 41.0)]
SEGMENTS = {"tumour 1": 1, "tumour 2": 2}


@pytest.mark.parametrize("write", [write_ct, write_enhanced_ct])
def test_each_lesion_is_a_group_that_refers_to_its_segment(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "ct")
    scan = read_series(tmp_path / "ct")
    write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), SEGMENTS)
    write_measurement_report(tmp_path / "sr.dcm", scan, tmp_path / "seg.dcm", LESIONS, algorithm="unet")
    report, seg = hd.sr.srread(tmp_path / "sr.dcm"), pydicom.dcmread(tmp_path / "seg.dcm")
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert len(groups) == 2 and report.PatientID == PATIENT_ID
    for number, (group, lesion) in enumerate(zip(groups, LESIONS, strict=True), start=1):
        segment = seg.SegmentSequence[number - 1]
        assert (group.tracking_uid, group.tracking_identifier) == (segment.TrackingUID, f"tumour {number}")
        assert group.finding_type.meaning == "Neoplasm" and group.finding_sites[0].value.meaning == "Lung"
        item = group.referenced_segment
        assert (item.referenced_sop_instance_uid, item.referenced_segment_numbers) == (
            seg.SOPInstanceUID,
            [number],
        )
        found = {one.name.meaning: (one.value, one.unit.value) for one in group.get_measurements()}
        assert found == {
            "Volume": (lesion.volume_ml, "cm3"),
            "Long axis": (lesion.long_axis_mm, "mm"),
            "Short axis": (lesion.short_axis_mm, "mm"),
            "Attenuation Coefficient": (lesion.mean_hu, "[hnsf'U]"),
        }


def test_a_report_without_lesions_says_what_was_looked_at(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct")
    write_measurement_report(tmp_path / "sr.dcm", read_series(tmp_path / "ct"), None, [])
    report = hd.sr.srread(tmp_path / "sr.dcm")
    assert report.content.get_volumetric_roi_measurement_groups() == [] and report.PatientID == PATIENT_ID
    (group,) = report.content.get_image_measurement_groups()
    assert group.tracking_identifier == "no lesion found" and group.get_measurements()[0].value == 0
    assert (
        len(
            report.CurrentRequestedProcedureEvidenceSequence[0]
            .ReferencedSeriesSequence[0]
            .ReferencedSOPSequence
        )
        == 6
    )


def test_another_number_of_segments_and_bad_attributes_are_refused(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct")
    scan = read_series(tmp_path / "ct")
    write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), SEGMENTS)
    with pytest.raises(UsageError, match="2 segments for 1 lesions"):
        write_measurement_report(tmp_path / "sr.dcm", scan, tmp_path / "seg.dcm", LESIONS[:1])
    write_ct(tmp_path / "other", edit=change(StudyInstanceUID=None))
    with pytest.raises(DataError, match="no report can be made"):
        write_measurement_report(tmp_path / "sr.dcm", read_series(tmp_path / "other"), None, [])
    assert not (tmp_path / "sr.dcm").exists()
