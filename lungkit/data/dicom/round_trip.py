"""Where the masks in a file lie, by the file's own coordinates alone, held against where they should."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lungkit.data.dicom._packages import require
from lungkit.data.dicom.files import decoding, read_dataset
from lungkit.data.dicom.series import DicomScan
from lungkit.data.dicom.slices import LPS_TO_RAS
from lungkit.errors import DataError

MAX_OFF_VOXELS = 0.5
"""How far the centroid of a class may be from where it was, along any axis of the voxels."""


def check_centroids(
    path: Path, scan: DicomScan, mask: np.ndarray, labels: Mapping[str, int], *, name: str
) -> None:
    """Refuse a SEG or RTSTRUCT whose classes do not lie where they do in ``mask``.

    The file is read back, and the centroid of each structure in patient coordinates follows from the positions that it
    holds; that of the mask follows from the affine of the scan.

    Args:
        path: the file that was written.
        scan: the series that it refers to.
        mask: (X, Y, Z) that it should hold.
        labels: name to value.
        name: of the file in messages.

    Raises:
        DataError: a class is missing, or its centroid over :data:`MAX_OFF_VOXELS` away; says where it lies.

    Example:
        >>> check_centroids(Path("seg.dcm"), scan, mask, {"tumour": 1}, name="seg.dcm")  # doctest: +SKIP
    """
    dataset = read_dataset(path)
    with decoding(path):
        found = _of_frames(dataset) if "SegmentSequence" in dataset else _of_contours(dataset)
    affine = LPS_TO_RAS @ scan.volume.affine
    indices = _centroids(mask, max(int(mask.max()), *labels.values()))
    for label, value in labels.items():
        expected = indices[value]
        if np.isnan(expected).any():
            continue  # no voxel has it
        where = found.get(label.strip())
        off = np.inf if where is None else np.abs(np.linalg.solve(affine, [*where, 1.0])[:3] - expected).max()
        if not off <= MAX_OFF_VOXELS:
            there = (
                "is not in the file"
                if where is None
                else f"lies at {_text(where)} mm in it, {off:.2f} voxels away"
            )
            raise DataError(
                f"{name}: not written, because {label!r}, at {_text((affine @ [*expected, 1.0])[:3])} mm in the scan, "
                f"{there}; the positions in the series contradict each other: export it again, or write NIfTI"
            )


def _centroids(mask: np.ndarray, most: int) -> np.ndarray:
    """Mean voxel index (most + 1, 3) of every value from 0, a slice at a time; NaN where no voxel has it, and for 0."""
    counts, totals = np.zeros(most + 1), np.zeros((3, most + 1))
    for z in range(mask.shape[2]):
        x, y = np.nonzero(mask[:, :, z])
        values = mask[x, y, z].astype(np.intp)
        found = np.bincount(values, minlength=most + 1)
        counts += found
        totals += (np.bincount(values, x, most + 1), np.bincount(values, y, most + 1), z * found)
    with np.errstate(invalid="ignore"):
        return (totals / counts).T


def _of_frames(dataset: Any) -> dict[str, np.ndarray]:
    """Centroid (LPS mm) of each segment of a SEG by its label."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    labels = {int(item.SegmentNumber): str(item.SegmentLabel).strip() for item in dataset.SegmentSequence}
    counts, totals = dict.fromkeys(labels, 0), {number: np.zeros(3) for number in labels}
    decode = require("pydicom.pixels").iter_pixels
    for groups, pixels in zip(dataset.PerFrameFunctionalGroupsSequence, decode(dataset), strict=True):

        def of(name: str, groups: Any = groups) -> Any:
            return (groups.get(name) or shared.get(name))[0]

        number = int(of("SegmentIdentificationSequence").ReferencedSegmentNumber)
        directions = np.array(of("PlaneOrientationSequence").ImageOrientationPatient, np.float64).reshape(
            2, 3
        )
        between_rows, between_columns = (float(size) for size in of("PixelMeasuresSequence").PixelSpacing)
        position = np.array(of("PlanePositionSequence").ImagePositionPatient, np.float64)
        rows, columns = np.nonzero(pixels)
        counts[number] += len(rows)
        totals[number] += (
            len(rows) * position
            + columns.sum() * between_columns * directions[0]
            + rows.sum() * between_rows * directions[1]
        )
    return {labels[number]: totals[number] / count for number, count in counts.items() if count}


def _of_contours(dataset: Any) -> dict[str, np.ndarray]:
    """Centroid (LPS mm) of each structure of an RTSTRUCT by its name, contours weighted by their area."""
    names = {int(item.ROINumber): str(item.ROIName).strip() for item in dataset.StructureSetROISequence}
    found = {}
    for drawing in dataset.ROIContourSequence:
        area, total = 0.0, np.zeros(3)
        for contour in drawing.get("ContourSequence") or ():
            points = np.array(contour.ContourData, np.float64).reshape(-1, 3)
            origin, points = points[0], points - points[0]
            following = np.roll(points, -1, axis=0)
            normals = (
                np.cross(points, following) / 2
            )  # area of each triangle with the origin, with its direction
            whole = normals.sum(axis=0)
            size = float(np.linalg.norm(whole))
            if size:
                shares = normals @ whole / size
                total += size * origin + shares @ (points + following) / 3
                area += size
        if area:
            found[names[int(drawing.ReferencedROINumber)]] = total / area
    return found


def _text(point: Any) -> str:
    return "(" + ", ".join(f"{float(value):.1f}" for value in point) + ")"
