"""What a report says of a predicted mask: volume and diameter of every class, and each of its lesions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from lungkit.data.geometry import Geometry, orient, plan_geometry
from lungkit.data.volume import Volume
from lungkit.metrics import axial_diameters_mm, label_lesions

_DIGITS = {"ml": 4, "mm": 2}


def measure_mask(
    mask: np.ndarray,
    affine: np.ndarray,
    labels: Mapping[str, int],
    *,
    image: np.ndarray | None = None,
    regions: Mapping[str, Collection[int]] | None = None,
) -> dict[str, Any]:
    """Volume in ml, longest in-plane diameter in mm and lesions of every class of a mask.

    A lesion is a 26-connected component of one class; they are listed from the largest to the smallest, each with its
    volume, its long and short axial diameter (:func:`lungkit.metrics.axial_diameters_mm`), its centroid in DICOM
    patient coordinates (mm to the patient's left, to the back, to the head), its voxels and, where the scan is given,
    their mean intensity.

    Args:
        mask: (X, Y, Z) as in its file.
        affine: (4, 4), voxel to RAS+ mm.
        labels: class name -> value in ``mask``; 0 is the background.
        image: the scan (X, Y, Z), HU for CT.
        regions: all values that belong to a class, where classes lie inside each other.

    Example:
        >>> mask = np.zeros((10, 10, 4), np.uint8)
        >>> mask[2:4, 3, 1] = 1
        >>> found = measure_mask(mask, np.diag([1.0, 1.0, 5.0, 1.0]), {"background": 0, "tumour": 1})["tumour"]
        >>> found["volume_ml"], found["longest_diameter_mm"], found["lesions"][0]["centroid_lps_mm"]
        (0.01, 2.0, [-2.5, -3.0, 5.0])
    """
    geometry = plan_geometry(Volume(mask, affine))
    slices = orient(mask, geometry)
    scan = None if image is None else orient(image, geometry)
    ml = math.prod(geometry.spacing_mm) / 1000
    found = {}
    for name, value in labels.items():
        if value == 0:
            continue
        inside = slices
        if regions is not None:
            inside = np.where(np.isin(slices, list(regions[name])), value, 0).astype(slices.dtype)
        lesions = [lesion.measures for lesion in _lesions(inside, value, geometry, scan)]
        found[name] = {
            "volume_ml": round(sum(lesion["voxels"] for lesion in lesions) * ml, _DIGITS["ml"]),
            "longest_diameter_mm": max((lesion["longest_diameter_mm"] for lesion in lesions), default=0.0),
            "lesions": lesions,
        }
    return found


def separate_lesions(
    mask: np.ndarray, affine: np.ndarray, labels: Mapping[str, int], image: np.ndarray, *, most: int
) -> tuple[np.ndarray, list[tuple[str, dict[str, Any]]]]:
    """A number for every lesion of a mask, and what :func:`measure_mask` says of it.

    Args:
        mask, affine, labels, image: as for :func:`measure_mask`.
        most: keep the largest, where there are more.

    Returns:
        uint16 (X, Y, Z), 0 or the number of a lesion from 1 in the order of the list, and the list: class and measures,
        by class as in ``labels``, from the largest to the smallest.

    Example:
        >>> mask = np.zeros((8, 8, 2), np.uint8)
        >>> mask[1, 1, 0], mask[4:6, 4, 0] = 1, 1
        >>> numbers, found = separate_lesions(mask, np.eye(4), {"nodule": 1}, mask * 40, most=9)
        >>> numbers[1, 1, 0], numbers[4, 4, 0], [(name, lesion["mean_intensity"]) for name, lesion in found]
        (np.uint16(2), np.uint16(1), [('nodule', 40.0), ('nodule', 40.0)])
    """
    geometry = plan_geometry(Volume(mask, affine))
    slices, scan = orient(mask, geometry), orient(image, geometry)
    found = [
        (name, lesion)
        for name, value in labels.items()
        if value != 0
        for lesion in _lesions(slices, value, geometry, scan)
    ]
    if len(found) > most:
        smallest = sorted((lesion.measures["voxels"] for _, lesion in found), reverse=True)[most - 1]
        found = [entry for entry in found if entry[1].measures["voxels"] >= smallest][:most]
    numbers = np.zeros(mask.shape, np.uint16)
    oriented = orient(numbers, geometry)
    for number, (_, lesion) in enumerate(found, start=1):
        oriented[lesion.box][lesion.inside] = number
    return numbers, [(name, lesion.measures) for name, lesion in found]


class _Lesion(NamedTuple):
    measures: dict[str, Any]
    box: tuple[slice, slice, slice]
    inside: np.ndarray  # within the box


def _lesions(slices: np.ndarray, value: int, geometry: Geometry, scan: np.ndarray | None) -> list[_Lesion]:
    """Lesions of a class on the oriented grid, from the largest to the smallest."""
    import cc3d

    ml = math.prod(geometry.spacing_mm) / 1000
    box = _box(slices, value)
    if box is None:
        return []
    lesions: list[_Lesion] = []
    numbered, count = label_lesions(slices[box] == value)
    statistics = cc3d.statistics(numbered)
    corner = np.array([side.start for side in box])
    for lesion in range(1, count + 1):
        part = statistics["bounding_boxes"][lesion]
        inside = numbered[part] == lesion
        size = int(statistics["voxel_counts"][lesion])
        long, short = axial_diameters_mm(inside, geometry.spacing_mm)
        measures = {
            "volume_ml": round(size * ml, _DIGITS["ml"]),
            "longest_diameter_mm": _rounded(long),
            "short_diameter_mm": _rounded(short),
            "centroid_lps_mm": _patient_position(statistics["centroids"][lesion] + corner, geometry),
            "voxels": size,
        }
        depth, height, width = (
            slice(int(own.start + first), int(own.stop + first))
            for own, first in zip(part, corner, strict=True)
        )
        place = (depth, height, width)
        if scan is not None:
            measures["mean_intensity"] = _rounded(scan[place][inside].mean(dtype=np.float64))
        lesions.append(_Lesion(measures, place, inside))
    lesions.sort(key=lambda one: (-one.measures["voxels"], one.measures["centroid_lps_mm"]))
    return lesions


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
