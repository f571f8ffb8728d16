"""Points and boxes in mm of the world on the grid of a scan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungkit.data.geometry import Geometry
from lungkit.data.volume import Volume
from lungkit.errors import UsageError

Crop = tuple[slice, slice, slice]
"""Voxels (Z, Y, X) of the oriented grid."""


@dataclass(frozen=True)
class Box:
    """Two opposite corners in mm to the right, front and head: the middle is the point, the walls are the limit."""

    first: tuple[float, float, float]
    second: tuple[float, float, float]

    @property
    def centre(self) -> tuple[float, float, float]:
        """Where the nodule is looked for."""
        x, y, z = ((one + other) / 2 for one, other in zip(self.first, self.second, strict=True))
        return x, y, z


def voxel_at(point: tuple[float, float, float], geometry: Geometry, scan: Volume) -> np.ndarray:
    """Voxel (Z, Y, X) on the oriented grid.

    Raises:
        UsageError: outside of the scan; says where the scan lies.
    """
    if len(point) != 3 or not all(math.isfinite(value) for value in point):
        raise UsageError(f"point {tuple(point)} must be three finite numbers, x, y, z in mm")
    index = _stored(point, scan.affine)
    size = np.array(scan.array.shape)
    if (index < -0.5).any() or (index > size - 0.5).any():
        corners = np.array(
            [[*corner, 1.0] for corner in itertools.product(*((-0.5, extent - 0.5) for extent in size))]
        )
        ends = (corners @ scan.affine.T)[:, :3]
        x, y, z = point
        low, high = ends.min(axis=0), ends.max(axis=0)
        sides = ", ".join(
            f"{name} {first:.1f} to {last:.1f}" for name, first, last in zip("xyz", low, high, strict=True)
        )
        lps = ", ".join(
            f"{name} {first:.1f} to {last:.1f}"
            for name, first, last in zip(
                "xyz", (-high[0], -high[1], low[2]), (-low[0], -low[1], high[2]), strict=True
            )
        )
        raise UsageError(
            f"{scan.path or 'the scan'}: the point {_text(point)} mm (RAS; in LPS, DICOM's, "
            f"{_text((-x + 0.0, -y + 0.0, z))}) lies outside of the scan, which spans "
            f"{sides} mm in RAS ({lps} in LPS); give world coordinates in mm, not voxel numbers"
        )
    place: np.ndarray = np.rint(np.clip(_oriented(index, geometry), 0, np.array(geometry.oriented_shape) - 1))
    return place.astype(np.int64)


def box_walls(box: Box, geometry: Geometry) -> Crop:
    """The voxels within a box.

    Raises:
        UsageError: there are none.
    """
    corners = [
        _oriented(_stored((x, y, z), geometry.affine), geometry)
        for x, y, z in itertools.product(*zip(box.first, box.second, strict=True))
    ]
    low = np.ceil(np.min(corners, axis=0) - 1e-6).astype(int)
    high = np.floor(np.max(corners, axis=0) + 1e-6).astype(int) + 1
    if (high <= low).any():
        raise UsageError(
            f"box {_text(box.first)} to {_text(box.second)} mm holds no voxel; give two opposite corners"
        )
    depth, height, width = (slice(int(first), int(last)) for first, last in zip(low, high, strict=True))
    return depth, height, width


def _stored(point: tuple[float, float, float], affine: np.ndarray) -> np.ndarray:
    """Fractional index (X, Y, Z) of a point in mm."""
    index: np.ndarray = np.linalg.solve(affine, [*point, 1.0])[:3]
    return index


def _oriented(index: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Index (Z, Y, X) on the oriented grid of one on the scan's own."""
    turned = np.empty(3)
    for axis, flip, size, value in zip(
        geometry.axes, geometry.flips, geometry.original_shape, index, strict=True
    ):
        turned[2 - axis] = size - 1 - value if flip else value
    return turned


def _text(point: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in point)
