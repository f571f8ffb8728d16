"""Pictures as DICOM secondary captures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_cases import PATIENT_ID, write_ct, write_enhanced_ct

from lungkit.data import read_series
from lungkit.data.dicom import write_secondary_capture
from lungkit.errors import DataError, UsageError

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (extra 'dicom')")
pytest.importorskip("highdicom", reason="highdicom is not installed (extra 'dicom')")


def test_it_is_the_picture_in_the_study_of_the_scan_and_no_scan(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (31, 20, 3), dtype=np.uint8)
    for number, write in enumerate((write_ct, write_enhanced_ct)):
        write(tmp_path / str(number))
        write_secondary_capture(tmp_path / f"{number}.dcm", read_series(tmp_path / str(number)), picture)
        dataset = pydicom.dcmread(tmp_path / f"{number}.dcm")
        np.testing.assert_array_equal(dataset.pixel_array, picture)
        assert (dataset.PatientID, dataset.StudyInstanceUID, dataset.BurnedInAnnotation) == (
            PATIENT_ID,
            "1.2.3",
            "NO",
        )
        assert dataset.SOPClassUID.name == "Secondary Capture Image Storage"
    (tmp_path / "0.dcm").rename(tmp_path / "captures.dcm")
    with pytest.raises(DataError, match="no CT series"):
        read_series(tmp_path)


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct")
    with pytest.raises(UsageError, match=r"float64 of shape \(4, 4\), expected uint8"):
        write_secondary_capture(tmp_path / "sc.dcm", read_series(tmp_path / "ct"), np.zeros((4, 4)))
