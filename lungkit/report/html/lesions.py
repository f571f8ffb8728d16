"""The lesions of a mask as a table for people: how large, where in the patient, how dense, how sure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lungkit.data.geometry import Geometry
from lungkit.metrics import axial_diameters_mm, label_lesions


@dataclass(frozen=True)
class Lesion:
    """One connected component (26 neighbours) of a class."""

    label: str
    volume_ml: float
    long_mm: float
    """Longest axial diameter, see :func:`lungkit.metrics.axial_diameters_mm`."""
    short_mm: float
    """Across the long one, in the same slice."""
    centre_lps_mm: tuple[float, float, float]
    """Centroid in DICOM patient coordinates: mm to the patient's left, to the back, to the head."""
    voxel: tuple[int, int, int]
    """(x, y, z) on the RAS+ grid of the page: the voxel of the lesion that lies nearest to its centroid."""
    voxels: int
    mean_value: float | None = None
    """Mean grey value of the scan within."""
    confidence: float | None = None
    """Mean probability of the class within."""


def find_lesions(
    mask: np.ndarray,
    geometry: Geometry,
    labels: Mapping[str, int],
    *,
    image: np.ndarray | None = None,
    probabilities: Mapping[str, np.ndarray] | None = None,
    most: int | None = None,
) -> tuple[list[Lesion], int]:
    """The lesions of every class, the largest first, and how many there are.

    Args:
        mask: (Z, Y, X) in RAS+.
        geometry: of the scan.
        labels: class name -> value in ``mask``; 0 is the background.
        image: the scan on the same grid.
        probabilities: of classes, on the same grid.
        most: that are measured, the largest ones: the mask of a poor model may have thousands.

    Example:
        >>> from lungkit.data import Volume
        >>> from lungkit.data.geometry import plan_geometry
        >>> mask = np.zeros((4, 10, 10), np.uint8)
        >>> mask[1, 3, 2:4] = 1
        >>> scan = Volume(mask.T, np.diag([1.0, 1.0, 5.0, 1.0]))
        >>> (lesion,), _ = find_lesions(mask, plan_geometry(scan), {"tumour": 1})
        >>> lesion.volume_ml, lesion.long_mm, lesion.short_mm, lesion.centre_lps_mm, lesion.voxel
        (0.01, 2.0, 1.0, (-2.5, -3.0, 5.0), (2, 3, 1))
    """
    import cc3d

    ml = math.prod(geometry.spacing_mm) / 1000
    to_lps = lps_matrix(geometry)
    lesions = []
    total = 0
    for name, value in labels.items():
        if value == 0 or not (inside := mask == value).any():
            continue
        numbered, count = label_lesions(inside)
        statistics = cc3d.statistics(numbered)
        total += count
        order = np.argsort(-statistics["voxel_counts"][1 : count + 1], kind="stable") + 1
        for number in order[:most].tolist():
            box = statistics["bounding_boxes"][number]
            part = numbered[box] == number
            centroid = np.asarray(statistics["centroids"][number], np.float64)
            places = np.argwhere(part) + [side.start for side in box]
            apart = ((places - centroid) * geometry.spacing_mm) ** 2
            z, y, x = (int(at) for at in places[apart.sum(1).argmin()])
            left, back, head = to_lps @ [*centroid[::-1], 1.0]
            long_mm, short_mm = axial_diameters_mm(part, geometry.spacing_mm)
            probability = (probabilities or {}).get(name)
            lesions.append(
                Lesion(
                    label=name,
                    volume_ml=len(places) * ml,
                    long_mm=long_mm,
                    short_mm=short_mm,
                    centre_lps_mm=(float(left) + 0.0, float(back) + 0.0, float(head) + 0.0),
                    voxel=(x, y, z),
                    voxels=len(places),
                    mean_value=None if image is None else float(image[box][part].mean(dtype=np.float64)),
                    confidence=None
                    if probability is None
                    else float(probability[box][part].mean(dtype=np.float64)),
                )
            )
    lesions.sort(key=lambda lesion: (-lesion.voxels, lesion.centre_lps_mm))
    return lesions[:most], total


def lps_matrix(geometry: Geometry) -> np.ndarray:
    """(3, 4): from (x, y, z, 1) on the RAS+ grid to DICOM patient coordinates in mm."""
    stored = np.zeros((4, 4))
    stored[3, 3] = 1.0
    for axis, (own, flip, size) in enumerate(
        zip(geometry.axes, geometry.flips, geometry.original_shape, strict=True)
    ):
        stored[axis, own] = -1.0 if flip else 1.0
        stored[axis, 3] = size - 1 if flip else 0.0
    return (np.diag([-1.0, -1.0, 1.0, 1.0]) @ geometry.affine @ stored)[:3]
