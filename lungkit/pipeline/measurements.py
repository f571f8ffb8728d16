"""What a report says of a predicted mask: volume and diameter of every class, and each of its lesions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lungkit.data.geometry import Geometry, orient, plan_geometry
from lungkit.data.volume import Volume
from lungkit.metrics import label_lesions, longest_diameter_mm

_DIGITS = {"ml": 4, "mm": 2}


def measure_mask(mask: np.ndarray, affine: np.ndarray, labels: Mapping[str, int]) -> dict[str, Any]:
    """Volume in ml, longest in-plane diameter in mm and lesions of every class of a mask.

    A lesion is a 26-connected component of one class; they are listed from the largest to the smallest, each with its
    volume, its longest axial diameter (:func:`lungkit.metrics.longest_diameter_mm`), its centroid in DICOM patient
    coordinates (mm to the patient's left, to the back, to the head) and the stored slices that it covers.

    Args:
        mask: (X, Y, Z) as in its file.
        affine: (4, 4), voxel to RAS+ mm.
        labels: class name -> value in ``mask``; 0 is the background.

    Example:
        >>> mask = np.zeros((10, 10, 4), np.uint8)
        >>> mask[2:4, 3, 1] = 1
        >>> found = measure_mask(mask, np.diag([1.0, 1.0, 5.0, 1.0]), {"background": 0, "tumour": 1})["tumour"]
        >>> found["volume_ml"], found["longest_diameter_mm"], found["lesions"][0]["centroid_lps_mm"]
        (0.01, 2.0, [-2.5, -3.0, 5.0])
    """
    geometry = plan_geometry(Volume(mask, affine))
    slices = orient(mask, geometry)
    return {name: _measure_class(slices, value, geometry) for name, value in labels.items() if value != 0}


def _measure_class(slices: np.ndarray, value: int, geometry: Geometry) -> dict[str, Any]:
    import cc3d

    ml = math.prod(geometry.spacing_mm) / 1000
    box = _box(slices, value)
    lesions: list[dict[str, Any]] = []
    voxels = 0
    if box is not None:
        numbered, count = label_lesions(slices[box] == value)
        voxels = int(np.count_nonzero(numbered))
        statistics = cc3d.statistics(numbered)
        corner = np.array([side.start for side in box])
        for lesion in range(1, count + 1):
            part = statistics["bounding_boxes"][lesion]
            size = int(statistics["voxel_counts"][lesion])
            lesions.append(
                {
                    "volume_ml": round(size * ml, _DIGITS["ml"]),
                    "longest_diameter_mm": _rounded(
                        longest_diameter_mm(numbered[part] == lesion, geometry.spacing_mm)
                    ),
                    "centroid_lps_mm": _patient_position(statistics["centroids"][lesion] + corner, geometry),
                    "voxels": size,
                }
            )
    lesions.sort(key=lambda lesion: (-lesion["voxels"], lesion["centroid_lps_mm"]))
    return {
        "volume_ml": round(voxels * ml, _DIGITS["ml"]),
        "longest_diameter_mm": max((lesion["longest_diameter_mm"] for lesion in lesions), default=0.0),
        "lesions": lesions,
    }


def _patient_position(zyx: np.ndarray, geometry: Geometry) -> list[float]:
    """DICOM patient coordinates in mm of a position on the oriented grid (z, y, x)."""
    along = np.asarray(zyx, np.float64)[::-1]
    stored = [
        (size - 1 - along[axis]) if flip else along[axis]
        for axis, flip, size in zip(geometry.axes, geometry.flips, geometry.original_shape, strict=True)
    ]
    right, front, head = (geometry.affine @ [*stored, 1.0])[:3]
    # Adding zero turns a minus zero into zero.
    return [_rounded(value) + 0.0 for value in (-right, -front, head)]


def _rounded(value: float) -> float:
    return round(float(value), _DIGITS["mm"])


def _box(slices: np.ndarray, value: int) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds a class, found a slice at a time."""
    flat = np.zeros(slices.shape[1:], bool)
    hit = np.zeros(len(slices), bool)
    for z, plane in enumerate(slices):
        inside = plane == value
        hit[z] = inside.any()
        if hit[z]:
            flat |= inside
    if not hit.any():
        return None
    sides = [np.flatnonzero(side) for side in (hit, flat.any(1), flat.any(0))]
    depth, height, width = (slice(int(side[0]), int(side[-1]) + 1) for side in sides)
    return depth, height, width
