"""Enhanced CT: a whole series in one multi-frame file, taken apart into a header a frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lungkit.data.dicom._packages import quiet, require
from lungkit.data.dicom.files import ENHANCED_CT, decoding, read_dataset
from lungkit.errors import DataError

# Functional groups (PS3.3 C.7.6.16.2, C.8.15.3), shared by all frames or one a frame, and what single-frame CT has at
# the top level of the object.
_GROUPS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
}
_FUNCTIONAL = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")


def is_enhanced(header: Any) -> bool:
    """Whether the object is enhanced CT, converted from single frames or not."""
    return header.SOPClassUID in ENHANCED_CT


def add_functional_groups(path: Path, header: Any) -> Any:
    """``header`` of :func:`~lungkit.data.dicom.files.read_header` with the functional groups of its file.

    Raises:
        DataError: the file cannot be read, or describes another number of frames than it says it holds.
    """
    dataset = read_dataset(path, pixels=False, keywords=_FUNCTIONAL)
    whole = _copy(header)
    with decoding(path):
        for keyword in _FUNCTIONAL:
            if keyword in dataset:
                whole[keyword] = dataset[keyword]
        described, frames = len(whole.get(_FUNCTIONAL[1]) or ()), int(whole.get("NumberOfFrames") or 1)
        if described != frames:
            raise DataError(f"{path.name}: {frames} frames, {described} described; export it again")
    return whole


def split_frames(path: Path, header: Any) -> list[Any]:
    """A header for each frame, as that of a single-frame CT image: its InstanceNumber is the frame's number from 1.

    What a frame does not say is missing in its header.

    Args:
        path: of the file.
        header: with functional groups, see :func:`add_functional_groups`.

    Raises:
        DataError: an attribute is damaged.
    """
    headers = []
    with decoding(path), quiet:
        shared = (header.get(_FUNCTIONAL[0]) or [None])[0]
        for number, own in enumerate(header[_FUNCTIONAL[1]].value, start=1):
            # Without its InstanceNumber: to set that of one would set it in the element that all copies share.
            frame = _copy(header, without=(*_FUNCTIONAL, "NumberOfFrames", "InstanceNumber"))
            frame.InstanceNumber = number
            for group, keywords in _GROUPS.items():
                for owner in (shared, own):
                    items = owner.get(group) if owner is not None else None
                    for keyword in keywords:
                        if items and keyword in items[0]:
                            frame[keyword] = items[0][keyword]
            headers.append(frame)
    return headers


def _copy(header: Any, without: tuple[str, ...] = ()) -> Any:
    """A dataset of the same elements: what copy() gives shares the table of them with the original."""
    pydicom = require("pydicom")
    left_out = {require("pydicom.datadict").tag_for_keyword(keyword) for keyword in without}
    dataset = pydicom.Dataset()
    dataset.file_meta = header.file_meta
    for tag in header.keys() - left_out:
        dataset[tag] = header.get_item(tag)
    return dataset
