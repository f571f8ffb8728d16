"""DICOM Segmentation objects (SEG): label masks as a PACS stores them, referring to the slices they were made on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lungkit
from lungkit._atomic import atomic_path
from lungkit.data.dicom._packages import quiet, require
from lungkit.data.dicom.files import decoding, read_dataset
from lungkit.data.dicom.labels import (
    LabelBuilder,
    check_frame_of_reference,
    check_mask,
    choose_character_set,
    choose_names,
    source_header,
)
from lungkit.data.dicom.round_trip import check_centroids
from lungkit.data.dicom.series import DicomScan
from lungkit.data.dicom.slices import LPS_TO_RAS
from lungkit.data.volume import Volume
from lungkit.errors import DataError

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"

_TUMOUR_WORDS = ("tumour", "tumor", "neoplasm", "cancer", "carcinoma", "gtv", "lesion")
_GRID_TOLERANCE = 0.1  # voxels


def write_dicom_seg(
    path: str | os.PathLike[str],
    scan: DicomScan,
    mask: np.ndarray,
    labels: Mapping[str, int],
    *,
    algorithm: str = "lungkit",
    version: str | None = None,
    series_description: str = "lungkit segmentation",
    series_number: int = 300,
) -> None:
    """Write ``mask`` as a binary DICOM SEG, whole or not at all.

    One segment for each name in ``labels``, in order of value, numbered from 1 as DICOM wants; frames without
    a voxel are left out. Names with tumour, nodule, lesion or GTV in them are coded as neoplasm or nodule of
    the lung, lung as lung, others as tissue (SNOMED CT). Each has a tracking identifier, its name, and a UID. Patient
    and study are those of the source. What was written is read back, see
    :func:`~lungkit.data.dicom.round_trip.check_centroids`.

    Args:
        path: of the file, usually ``.dcm``.
        scan: the series the mask belongs to.
        mask: whole numbers (X, Y, Z) on the grid of ``scan.volume``.
        labels: name to value, 1 to 65,535, up to 255 names; values in the mask without a name are refused.
        algorithm: name of what made the mask, and ``version`` (lungkit's own if None).
        series_description: of the new series, and its ``series_number``.

    Raises:
        UsageError: the mask or the labels do not fit; the folder cannot be written; highdicom is not installed.
        DataError: the source lacks tags or holds values that DICOM forbids; the mask would not lie where it should.
        ResourceError: the disk is full; nothing is left behind.

    Example:
        >>> write_dicom_seg("mask.dcm", scan, mask, {"tumour": 1})  # doctest: +SKIP
    """
    hd = require("highdicom")
    mask = check_mask(mask, scan, labels)
    names = sorted(labels, key=lambda name: labels[name])
    numbers = np.zeros(1 + max(labels.values()), np.uint8)
    for number, name in enumerate(names, start=1):
        numbers[labels[name]] = number
    sources, planes = [source_header(scan), *scan.headers[1:]], mask.T
    if scan.multiframe is not None:  # one source, and its frames in the order of the file
        sources = sources[:1]
        planes = planes[np.argsort([int(header.InstanceNumber) for header in scan.headers])]
    identification = {"name": algorithm[:64], "version": version or lungkit.__version__}
    try:
        with quiet:
            segmentation = hd.seg.Segmentation(
                source_images=sources,
                pixel_array=numbers[planes],
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[
                    _describe(hd, number, name, identification) for number, name in enumerate(names, start=1)
                ],
                series_instance_uid=hd.UID(),
                series_number=series_number,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="lungkit",
                manufacturer_model_name="lungkit",
                software_versions=lungkit.__version__,
                device_serial_number="none",
                content_label="SEGMENTATION",
                content_description="Made by a research tool, not a medical device",
                series_description=series_description,
                specific_character_set=choose_character_set(scan, [*names, algorithm, series_description]),
            )
    except MemoryError:
        raise
    except Exception as error:
        # The message may quote a patient attribute, so only its kind is passed on.
        raise DataError(
            f"{scan.series.files[0].name}: no segmentation can be made from this source ({type(error).__name__}): a "
            "patient, study or image attribute is missing or not allowed; correct it or export the series again"
        ) from None
    with atomic_path(path) as temporary:
        with quiet:
            segmentation.save_as(temporary)
        check_centroids(temporary, scan, mask, labels, name=Path(path).name)


def read_dicom_seg(
    path: str | os.PathLike[str], scan: DicomScan, *, segment: str | Sequence[str] | None = None
) -> tuple[Volume, dict[str, int]]:
    """Read a binary or label-map DICOM SEG onto the grid of ``scan``.

    Frames are placed by their position in space; they may be smaller than the slices (cropped), but must lie on
    the scan's voxels. Segments of the same label share a value; values count from 1 in order of segment number.

    Args:
        path: the file.
        scan: the series it was made on.
        segment: label of the one to read, or several; None: all.

    Returns:
        The mask, uint8 (X, Y, Z), and its names with their values.

    Raises:
        DataError: not a SEG or damaged; a fractional one; another frame of reference or grid; no such segment;
            segments that overlap.
        UsageError: pydicom is not installed.
    """
    path = Path(path)
    dataset = read_dataset(path)
    with decoding(path):
        if dataset.get("SOPClassUID") not in (SEGMENTATION, LABEL_MAP):
            raise DataError(f"{path.name}: not a DICOM segmentation; name a SEG object")
        kind = dataset.get("SegmentationType")
        if kind not in ("BINARY", "LABELMAP"):
            raise DataError(
                f"{path.name}: {kind} segmentation is not supported; threshold it to BINARY first"
            )
        check_frame_of_reference(dataset.get("FrameOfReferenceUID"), scan, path)
        segments = {int(item.SegmentNumber): str(item.SegmentLabel) for item in dataset.SegmentSequence}
        frames = list(dataset.PerFrameFunctionalGroupsSequence)
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
        if int(dataset.NumberOfFrames) != len(frames):
            raise DataError(
                f"{path.name}: {dataset.NumberOfFrames} frames, {len(frames)} described; export it again"
            )
        places = [_place(frame, shared, dataset, scan, path) for frame in frames]
        referenced = [None if kind == "LABELMAP" else _segment_of(frame, shared) for frame in frames]
    if kind == "LABELMAP":
        segments.pop(0, None)  # background
    wanted = choose_names(list(segments.values()), segment, path, "segment")
    builder = LabelBuilder(path, scan, "segment")
    for name in segments.values():
        if name in wanted:
            builder.value(name)
    for index, ((x, y, z), number) in enumerate(zip(places, referenced, strict=True)):
        if number is not None and segments.get(number) not in wanted:
            continue
        pixels = _pixels(dataset, index, path)
        present = np.unique(pixels).tolist() if number is None else [number]
        for one in present:
            if segments.get(one) in wanted:
                part = pixels != 0 if number is not None else pixels == one
                inside = np.zeros(builder.array.shape[1::-1], bool)
                inside[y : y + part.shape[0], x : x + part.shape[1]] = part
                builder.add(z, inside, segments[one])
    return builder.finish()


def _describe(hd: Any, number: int, name: str, identification: dict[str, str]) -> Any:
    codes = require("pydicom.sr.codedict").codes
    lowered, regions = name.lower(), None
    if any(word in lowered for word in _TUMOUR_WORDS):
        category, kind, regions = (
            codes.SCT.MorphologicallyAbnormalStructure,
            codes.SCT.Neoplasm,
            [codes.SCT.Lung],
        )
    elif "nodule" in lowered:
        category, kind, regions = (
            codes.SCT.MorphologicallyAbnormalStructure,
            codes.SCT.Nodule,
            [codes.SCT.Lung],
        )
    elif "lung" in lowered:
        category, kind = codes.SCT.AnatomicalStructure, codes.SCT.Lung
    else:
        category = kind = codes.SCT.Tissue
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            family=codes.DCM.ArtificialIntelligence, **identification
        ),
        tracking_uid=hd.UID(),
        tracking_id=name,
        anatomic_regions=regions,
    )


def _functional(frame: Any, shared: Any, name: str) -> Any:
    for groups in (frame, shared):
        if groups is not None and name in groups:
            return groups[name].value[0]
    raise KeyError(name)


def _segment_of(frame: Any, shared: Any) -> int:
    return int(_functional(frame, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)


def _place(frame: Any, shared: Any, dataset: Any, scan: DicomScan, path: Path) -> tuple[int, int, int]:
    """Voxel (x, y, z) of the frame's first pixel; DataError unless the frame lies on the scan's grid."""
    position = _functional(frame, shared, "PlanePositionSequence").ImagePositionPatient
    orientation = np.array(
        _functional(frame, shared, "PlaneOrientationSequence").ImageOrientationPatient, np.float64
    )
    spacing = np.array(_functional(frame, shared, "PixelMeasuresSequence").PixelSpacing, np.float64)
    affine = LPS_TO_RAS @ scan.volume.affine
    directions = np.concatenate([orientation[:3] * spacing[1], orientation[3:] * spacing[0]])
    off = float(np.abs(directions - affine[:3, :2].T.ravel()).max()) / float(spacing.min())
    index = np.linalg.solve(affine, np.array([*position, 1.0], np.float64))[:3]
    x, y, z = (int(value) for value in np.round(index))
    columns, rows, slices = scan.volume.array.shape
    # A direction that is a little off adds up over the frame.
    off = max(float(np.abs(index - (x, y, z)).max()), off * max(int(dataset.Rows), int(dataset.Columns)))
    fits = min(x, y) >= 0 and x + int(dataset.Columns) <= columns and y + int(dataset.Rows) <= rows
    if off > _GRID_TOLERANCE or not fits or not 0 <= z < slices:
        raise DataError(
            f"{path.name}: a frame of {dataset.Columns} x {dataset.Rows} at ({', '.join(f'{p:g}' for p in position)}) "
            f"mm does not lie on the scan's grid ({columns} x {rows} x {slices}); give the mask made on this series"
        )
    return x, y, z


def _pixels(dataset: Any, index: int, path: Path) -> np.ndarray:
    decode = require("pydicom.pixels").pixel_array
    try:
        with quiet:
            return np.asarray(decode(dataset, index=index))
    except Exception as error:  # each decoder has its own kinds
        raise DataError(
            f"{path.name}: frame {index + 1} cannot be decoded ({type(error).__name__}); the file is truncated or "
            "damaged: export or copy it again"
        ) from None
