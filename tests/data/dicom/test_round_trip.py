"""What was written is read back: a mask that does not lie where it should is refused and leaves no file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import OBLIQUE, make_mask, write_ct

from lungkit.data import read_series, write_dicom_seg, write_rtstruct
from lungkit.data.dicom import round_trip
from lungkit.data.dicom.slices import LPS_TO_RAS
from lungkit.errors import DataError

LABELS = {"tumour": 1, "lung": 2}


@pytest.mark.parametrize("write", [write_dicom_seg, write_rtstruct])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_file_off_by_more_than_half_a_voxel_is_refused(tmp_path: Path, write: Any, axis: int) -> None:
    write_ct(tmp_path / "ct", orientation=OBLIQUE)
    scan = read_series(tmp_path / "ct")
    for voxels, refused in ((0.4, False), (-0.6, True)):
        affine = scan.volume.affine.copy()
        affine[:3, 3] += voxels * affine[:3, axis]
        moved = replace(scan, volume=replace(scan.volume, affine=affine))
        path = tmp_path / "mask.dcm"
        if refused:
            with pytest.raises(
                DataError, match=r"mask\.dcm: not written, because 'tumour', at \(.*0\.60 voxels away"
            ):
                write(path, moved, make_mask(), LABELS)
            assert not path.exists()
        else:
            write(path, moved, make_mask(), LABELS)
            path.unlink()


@pytest.mark.parametrize("write", [write_dicom_seg, write_rtstruct])
def test_centroids_of_a_file_are_those_of_the_voxels(tmp_path: Path, write: Any) -> None:
    import pydicom

    write_ct(tmp_path / "ct", orientation=OBLIQUE)
    scan = read_series(tmp_path / "ct")
    write(tmp_path / "mask.dcm", scan, make_mask(), LABELS)
    dataset = pydicom.dcmread(tmp_path / "mask.dcm")
    found = (round_trip._of_frames if write is write_dicom_seg else round_trip._of_contours)(dataset)
    affine = LPS_TO_RAS @ scan.volume.affine
    for label, value in LABELS.items():
        expected = affine[:3, :3] @ np.argwhere(make_mask() == value).mean(axis=0) + affine[:3, 3]
        np.testing.assert_allclose(found[label], expected, atol=1e-3)


def test_a_class_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    write_ct(tmp_path / "ct")
    scan = read_series(tmp_path / "ct")
    write_dicom_seg(tmp_path / "seg.dcm", scan, make_mask(), LABELS)
    with pytest.raises(DataError, match=r"'node'.* is not in the file"):
        round_trip.check_centroids(tmp_path / "seg.dcm", scan, make_mask(), {"node": 1}, name="seg.dcm")
