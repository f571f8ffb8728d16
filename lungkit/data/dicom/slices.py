"""From the positions of slices to one grid: order, spacing, affine, and everything that makes a stack unusable.

DICOM gives positions in LPS mm (PS3.3 C.7.6.2.1.1). With row direction r, column direction c, normal
n = r x c and position p of a slice's first pixel, voxel (i, j, k) lies at p_k + i dx r + j dy c; slices are in
ascending order of n . p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungkit.errors import DataError, shorten

POSITION_TOLERANCE_MM = 0.1
"""How far a slice may lie from its place on an even grid; never more than a tenth of the spacing."""

MAX_TILT_DEGREES = 0.5
"""Angle between the slices' normal and the line through them; a smaller one is kept as shear in the affine."""

_SAME_PLACE_MM = 0.01
_SAME_DIRECTION = 1e-4

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class SliceGrid:
    """``order``: indices of the headers from the first slice to the last; ``affine`` (4, 4) in RAS+ mm."""

    order: list[int]
    affine: np.ndarray


def plan_slices(headers: Sequence[Any], names: Sequence[str]) -> SliceGrid:
    """Order the slices of one series and check that they fill an even, right-angled grid.

    Args:
        headers: with ImagePositionPatient, ImageOrientationPatient and PixelSpacing.
        names: of the files, for messages.

    Raises:
        DataError: a tag missing or unusable; orientation, pixel spacing differing between slices; two slices
            at one position; missing slices; uneven spacing; slices shifted sideways; gantry tilt.
    """
    orientations = _numbers(headers, names, "ImageOrientationPatient", 6)
    spacings = _numbers(headers, names, "PixelSpacing", 2)
    positions = _numbers(headers, names, "ImagePositionPatient", 3)
    _same(orientations, names, "orientation (ImageOrientationPatient)", _SAME_DIRECTION)
    _same(spacings, names, "pixel spacing (PixelSpacing, mm)", _SAME_DIRECTION * float(spacings.min()))
    row, column = orientations[0, :3], orientations[0, 3:]
    if max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column)) > 1e-3:
        raise DataError(
            f"{names[0]}: ImageOrientationPatient {_text(orientations[0])} is not two unit vectors at a right angle; "
            "correct the tag or export the series again"
        )
    if spacings.min() <= 0:
        raise DataError(f"{names[0]}: PixelSpacing {_text(spacings[0])} mm is not positive; correct the tag")
    normal = np.cross(row, column)
    heights = positions @ normal
    order = [int(index) for index in np.argsort(heights, kind="stable")]
    positions, heights = positions[order], heights[order]
    ordered = [names[index] for index in order]
    if len(order) == 1:
        step, first = normal * _thickness(headers[0], names[0]), positions[0]
    else:
        _refuse_duplicates(heights, ordered, [headers[index] for index in order])
        _refuse_gaps(heights, ordered)
        step, first = _line(positions, ordered)
        _refuse_tilt(step, normal, ordered)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * spacings[0, 1], column * spacings[0, 0]
    affine[:3, 2], affine[:3, 3] = np.round(step, 10), np.round(first, 10)  # the fit leaves digits of noise
    return SliceGrid(order=order, affine=LPS_TO_RAS @ affine)


def _numbers(headers: Sequence[Any], names: Sequence[str], keyword: str, count: int) -> np.ndarray:
    values = np.empty((len(headers), count))
    for row, header, name in zip(values, headers, names, strict=True):
        try:
            found = [float(value) for value in (header.get(keyword) or ())]
        except (TypeError, ValueError):
            raise DataError(f"{name}: {keyword} is not numbers; export the series again") from None
        if len(found) != count or not all(math.isfinite(value) for value in found):
            what = "is missing" if not found else f"holds {_text(found)}, expected {count} numbers"
            raise DataError(
                f"{name}: {keyword} {what}; a slice without it has no place in space: export it again"
            )
        row[:] = found
    return values


def _same(values: np.ndarray, names: Sequence[str], what: str, tolerance: float) -> None:
    different = np.flatnonzero(np.abs(values - values[0]).max(axis=1) > tolerance)
    if different.size:
        raise DataError(
            f"slices differ in {what}: {_text(values[0])} in {names[0]}, {_text(values[different[0]])} in "
            f"{shorten(names[int(index)] for index in different)}; move what does not belong to the scan out "
            "of the folder"
        )


def _thickness(header: Any, name: str) -> float:
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        try:
            value = float(header.get(keyword))
        except (TypeError, ValueError):
            continue  # absent, or no number
        if math.isfinite(value) and value > 0:
            return value
    raise DataError(f"{name}: a single slice with neither SliceThickness nor SpacingBetweenSlices; add one")


def _refuse_duplicates(heights: np.ndarray, names: list[str], headers: list[Any]) -> None:
    twice = np.flatnonzero(np.diff(heights) < _SAME_PLACE_MM)
    if not twice.size:
        return
    pairs = shorten((f"{names[i]} and {names[i + 1]} at {heights[i]:.3f} mm" for i in twice), limit=3)
    if all(_identity(headers[i]) == _identity(headers[i + 1]) for i in twice):
        raise DataError(f"the same slice is there more than once: {pairs}; remove the copies")
    acquisitions = {str(header.get("AcquisitionNumber")) for header in headers}
    several = f" (acquisitions {', '.join(sorted(acquisitions))})" if len(acquisitions) > 1 else ""
    raise DataError(
        f"two slices at one position: {pairs}; the series holds several phases or reconstructions{several}: put each "
        "into a folder of its own"
    )


def _identity(header: Any) -> tuple[str, str]:
    """Frames of one file share its UID."""
    return str(header.SOPInstanceUID), str(header.get("InstanceNumber"))


def _refuse_gaps(heights: np.ndarray, names: list[str]) -> None:
    gaps = np.diff(heights)
    usual = float(
        np.sort(gaps)[(len(gaps) - 1) // 2]
    )  # the lower median: a gap among two must not count as usual
    tolerance = 2 * _tolerance_mm(usual)
    missing = []
    for index in np.flatnonzero(gaps > usual + tolerance):
        times = round(gaps[index] / usual)
        if times >= 2 and abs(gaps[index] - times * usual) <= times * tolerance:
            between = f"{names[index]} ({heights[index]:.3f} mm) and {names[index + 1]} ({heights[index + 1]:.3f} mm)"
            missing.append(f"{times - 1} between {between}")
    if missing:
        raise DataError(
            f"slices are missing, at a spacing of {usual:.3f} mm: {shorten(missing, limit=3)}; "
            "export the whole series again"
        )
    uneven = np.flatnonzero(np.abs(gaps - usual) > tolerance)
    if uneven.size:
        where = shorten(
            (
                f"{gaps[i]:.3f} mm between {names[i]} ({heights[i]:.3f} mm) and {names[i + 1]} "
                f"({heights[i + 1]:.3f} mm)"
                for i in uneven
            ),
            limit=3,
        )
        raise DataError(
            f"uneven slice spacing: {usual:.3f} mm, but {where}; put each stack into a folder of its own, or "
            "resample the scan to an even spacing"
        )


def _line(positions: np.ndarray, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Step and first point of the straight line through the positions, by least squares."""
    count = len(positions)
    index = np.arange(count) - (count - 1) / 2
    step = index @ positions / (index @ index)
    first = positions.mean(axis=0) + index[0] * step
    expected = first + np.arange(count)[:, None] * step
    away = np.linalg.norm(positions - expected, axis=1)
    worst = int(away.argmax())
    if away[worst] > _tolerance_mm(float(np.linalg.norm(step))):
        raise DataError(
            f"{names[worst]}: at {_text(positions[worst])} mm, {away[worst]:.3f} mm away from its place on an even "
            f"grid, {_text(expected[worst])} mm; put each stack into a folder of its own, or resample the scan"
        )
    return step, first


def _refuse_tilt(step: np.ndarray, normal: np.ndarray, names: list[str]) -> None:
    along = float(step @ normal)
    tilt = math.degrees(math.atan2(float(np.linalg.norm(step - along * normal)), along))
    if tilt > MAX_TILT_DEGREES:
        raise DataError(
            f"{names[0]} to {names[-1]}: gantry tilt of {tilt:.1f} degrees, so the voxels are not boxes and lengths "
            "and volumes would be wrong; resample the scan to a right-angled grid first (dcm2niix does)"
        )


def _tolerance_mm(spacing_mm: float) -> float:
    return min(POSITION_TOLERANCE_MM, spacing_mm / 10)


def _text(values: Any) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
