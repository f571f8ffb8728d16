"""Enhanced CT, a whole series in one multi-frame file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_cases import OBLIQUE, make_mask, write_ct, write_enhanced_ct

from lungkit.data import read_dicom_seg, read_rtstruct, read_series, write_dicom_seg, write_rtstruct
from lungkit.errors import DataError

RLE, JPEG_LS = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80"


@pytest.mark.parametrize("options", [{}, {"orientation": OBLIQUE}, {"compress": RLE}, {"compress": JPEG_LS}])
def test_it_is_the_same_volume_as_the_series_of_single_slices(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    hu = write_ct(tmp_path / "single", **options)
    write_enhanced_ct(tmp_path / "enhanced", **options)
    single, enhanced = read_series(tmp_path / "single"), read_series(tmp_path / "enhanced")
    np.testing.assert_array_equal(enhanced.volume.array, hu)
    np.testing.assert_array_equal(enhanced.volume.affine, single.volume.affine)
    assert enhanced.series.slices == 6 and [header.InstanceNumber for header in enhanced.headers] == [
        6,
        5,
        4,
        3,
        2,
        1,
    ]


def test_values_are_rescaled_frame_by_frame(tmp_path: Path) -> None:
    def edit(dataset: Any) -> None:
        from pydicom.dataset import Dataset

        own = Dataset()
        own.RescaleSlope, own.RescaleIntercept = 1, 0
        dataset.PerFrameFunctionalGroupsSequence[0].PixelValueTransformationSequence = [own]

    hu = write_enhanced_ct(tmp_path, edit=edit).astype(np.int32)
    hu[:, :, 5] += 1024  # the first frame is the last slice
    np.testing.assert_array_equal(read_series(tmp_path).volume.array, hu)


@pytest.mark.parametrize(
    ("write", "read"), [(write_dicom_seg, read_dicom_seg), (write_rtstruct, read_rtstruct)]
)
def test_masks_refer_to_the_frames_and_lie_where_they_were(tmp_path: Path, write: Any, read: Any) -> None:
    import pydicom

    write_enhanced_ct(tmp_path / "ct")
    scan, mask = read_series(tmp_path / "ct"), make_mask()
    write(tmp_path / "mask.dcm", scan, mask, {"tumour": 1, "lung": 2})
    found, labels = read(tmp_path / "mask.dcm", scan)
    np.testing.assert_array_equal(found.array, mask)
    assert labels == {"tumour": 1, "lung": 2}
    text = str(pydicom.dcmread(tmp_path / "mask.dcm"))
    assert "Referenced Frame Number" in text and scan.multiframe.SOPInstanceUID in text


def fewer_frames(dataset: Any) -> None:
    del dataset.PerFrameFunctionalGroupsSequence[0]


def no_position(dataset: Any) -> None:
    del dataset.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence


def one_place(dataset: Any) -> None:
    frames = dataset.PerFrameFunctionalGroupsSequence
    frames[1].PlanePositionSequence = frames[2].PlanePositionSequence


def short(dataset: Any) -> None:
    dataset.PixelData = dataset.PixelData[:-300]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (fewer_frames, "enhanced.dcm: 6 frames, 5 described"),
        (no_position, "enhanced.dcm, frame 3: ImagePositionPatient is missing"),
        (one_place, "two slices at one position: enhanced.dcm, frame"),
        (short, "enhanced.dcm: the pixels cannot be decoded"),
    ],
)
def test_what_is_missing_is_named_with_the_frame(tmp_path: Path, edit: Any, message: str) -> None:
    write_enhanced_ct(tmp_path, edit=edit)
    with pytest.raises(DataError, match=message):
        read_series(tmp_path)
