"""Size of a lesion: volume in ml, and the longest in-plane diameter that RECIST measures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lungkit.errors import UsageError
from lungkit.metrics.lesions import label_lesions
from lungkit.metrics.overlap import ArrayLike
from lungkit.metrics.surface import as_numpy

_MM3_PER_ML = 1000.0


def volume_ml(mask: ArrayLike, spacing_mm: Sequence[float]) -> float:
    """Volume of a mask: voxels times the size of one.

    Args:
        mask: foreground where not 0.
        spacing_mm: size of a voxel along every axis.

    Example:
        >>> volume_ml(np.ones((2, 10, 10)), (5.0, 1.0, 1.0))
        1.0
    """
    array = as_numpy(mask)
    if len(spacing_mm) != array.ndim:
        raise UsageError(f"spacing_mm must be {array.ndim} numbers, one an axis, got {tuple(spacing_mm)}")
    return int(np.count_nonzero(array)) * math.prod(float(step) for step in spacing_mm) / _MM3_PER_ML


def longest_diameter_mm(mask: ArrayLike, spacing_mm: Sequence[float]) -> float:
    """Longest in-plane diameter of the lesions of a mask, as the long axis of RECIST 1.1 measures one lesion.

    For every lesion (26-connected) and every axial slice, the largest distance between two points of the lesion's
    outline in that slice, over all slices and lesions. The outline runs through the middle of the outer voxel faces:
    a single voxel is as long as its wider side. 0 for an empty mask.

    Source: Eisenhauer et al. 2009, "New response evaluation criteria in solid tumours: RECIST 1.1".

    Args:
        mask: (Z, Y, X), slices along the first axis; or one slice (Y, X). Foreground where not 0.
        spacing_mm: size of a voxel along every axis.

    Example:
        >>> mask = np.zeros((1, 10, 10))
        >>> mask[0, 2:6, 3] = 1
        >>> longest_diameter_mm(mask, (2.5, 0.8, 0.5))
        3.2
    """
    array = as_numpy(mask) != 0
    if array.ndim not in (2, 3) or len(spacing_mm) != array.ndim:
        raise UsageError(
            f"mask must be (Y, X) or (Z, Y, X) with one spacing an axis, got shape {array.shape} "
            f"and spacing_mm {tuple(spacing_mm)}"
        )
    lesions, count = label_lesions(array)
    volume = lesions.reshape((1,) * (3 - array.ndim) + array.shape)
    longest = 0.0
    for lesion in range(1, count + 1):
        voxels = np.argwhere(volume == lesion)
        for z in np.unique(voxels[:, 0]):
            plane = voxels[voxels[:, 0] == z][:, 1:]
            # The diagonal of the box bounds the diameter: most slices need no more than this.
            diagonal = math.dist(
                (0, 0), (np.ptp(plane, axis=0) + 1) * np.asarray(spacing_mm[-2:], np.float64)
            )
            if diagonal > longest:
                longest = max(longest, _diameter(plane, spacing_mm[-2:]))
    return round(longest, 9)


def axial_diameters_mm(mask: ArrayLike, spacing_mm: Sequence[float]) -> tuple[float, float]:
    """Long and short axis of one lesion, as RECIST 1.1 measures them on axial slices.

    The long axis is :func:`longest_diameter_mm`; the short one is the longest line at a right angle to it within the
    convex outline of the lesion, in the slice of the long axis. (0, 0) for an empty mask.

    Args:
        mask: (Z, Y, X), slices along the first axis; foreground where not 0, all of it one lesion.
        spacing_mm: size of a voxel along every axis.

    Raises:
        UsageError: not three axes.

    Example:
        >>> mask = np.zeros((1, 10, 10))
        >>> mask[0, 2:8, 3:5] = 1
        >>> long, short = axial_diameters_mm(mask, (2.5, 0.8, 0.5))
        >>> round(long, 2), round(short, 2)
        (4.83, 1.01)
    """
    array = as_numpy(mask) != 0
    if array.ndim != 3 or len(spacing_mm) != 3:
        raise UsageError(
            f"mask must be (Z, Y, X) with three spacings, got shape {array.shape} and spacing_mm {tuple(spacing_mm)}"
        )
    best = (0.0, 0.0)
    for plane in array:
        voxels = np.argwhere(plane)
        if not len(voxels):
            continue
        diagonal = math.dist((0, 0), (np.ptp(voxels, axis=0) + 1) * np.asarray(spacing_mm[-2:], np.float64))
        if diagonal > best[0]:
            best = max(best, _axes(voxels, spacing_mm[-2:]))
    return round(best[0], 9), round(best[1], 9)


def _axes(voxels: np.ndarray, spacing_mm: Sequence[float]) -> tuple[float, float]:
    """Longest diameter, and the longest chord of the hull across it."""
    hull = _hull(voxels, spacing_mm)
    between = hull[:, None] - hull[None]
    first, second = np.unravel_index(int((between**2).sum(-1).argmax()), between.shape[:2])
    longest = float(np.linalg.norm(between[first, second]))
    along = between[first, second] / longest
    # Along the long axis, from one of its ends to the other, run the two sides of the hull.
    place, height = hull @ along, hull @ [-along[1], along[0]]
    start = int(place.argmin())
    place, height = np.roll(place, -start), np.roll(height, -start)
    end = int(place.argmax())
    one = np.interp(place, place[: end + 1], height[: end + 1])
    back = np.r_[np.arange(end, len(place)), 0][::-1]
    other = np.interp(place, place[back], height[back])
    return longest, float(np.abs(one - other).max())


def _diameter(voxels: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Largest distance between two face centres of the pixels (N, 2)."""
    hull = _hull(voxels, spacing_mm)
    return float(np.sqrt(((hull[:, None] - hull[None]) ** 2).sum(-1).max()))


def _hull(voxels: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Corners of the convex hull of the pixels' face centres, in mm."""
    half = np.array([[-0.5, 0.0], [0.5, 0.0], [0.0, -0.5], [0.0, 0.5]])
    points = (voxels[:, None, :] + half).reshape(-1, 2) * np.asarray(spacing_mm, np.float64)
    return _convex_hull(points)


def _convex_hull(points: np.ndarray) -> np.ndarray:
    """Corners of the convex hull (Andrew's monotone chain)."""
    # Only the ends of every line can be corners, which leaves a few points a line to the loop below.
    points = np.unique(points, axis=0)
    starts = np.flatnonzero(np.r_[True, points[1:, 0] != points[:-1, 0]])
    ends = np.r_[starts[1:], len(points)] - 1
    candidates = points[np.unique(np.r_[starts, ends])]

    def chain(ordered: np.ndarray) -> list[np.ndarray]:
        corners: list[np.ndarray] = []
        for point in ordered:
            while len(corners) > 1 and _cross(corners[-2], corners[-1], point) <= 0:
                corners.pop()
            corners.append(point)
        return corners

    return np.array(chain(candidates) + chain(candidates[::-1]))


def _cross(origin: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    return (first[0] - origin[0]) * (second[1] - origin[1]) - (first[1] - origin[1]) * (second[0] - origin[0])
