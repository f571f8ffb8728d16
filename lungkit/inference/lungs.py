"""The lungs in a CT, from its HU alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lungkit.data.resampling import resample_nearest

_WORKING_MM = 2.0
_AIR_HU = -400.0
_OUTER_AIR_HU = -960.0
_SMALLEST_LUNG_ML = 50.0


def lung_mask(hu: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Lungs of a CT: bool (Z, Y, X), vessels and nodules within them included; empty where there are none.

    Args:
        hu: (Z, Y, X) in HU, z towards the head.
        spacing_mm: (z, y, x).
    """
    import cc3d

    factors = [max(1, round(_WORKING_MM / size)) for size in spacing_mm]
    reduced = _reduce(hu, factors)
    spacing = [n * s / m for n, s, m in zip(hu.shape, spacing_mm, reduced.shape, strict=True)]
    pieces = cc3d.connected_components((reduced < _AIR_HU).view(np.uint8), connectivity=6)
    lungs = np.zeros(reduced.shape, bool)
    smallest = _SMALLEST_LUNG_ML * 1000 / np.prod(spacing)
    for number in range(1, int(pieces.max()) + 1):
        piece = pieces == number
        if np.count_nonzero(piece) >= smallest and np.median(reduced[piece]) > _OUTER_AIR_HU:
            lungs |= piece
    return resample_nearest(lungs, hu.shape)


def near(mask: np.ndarray, spacing_mm: Sequence[float], distance_mm: float) -> np.ndarray:
    """Voxels at most ``distance_mm`` from a mask, itself included; bool.

    Example:
        >>> near(np.array([[[True, False, False, False]]]), (5.0, 1.0, 1.0), 2.0).tolist()
        [[[True, True, True, False]]]
    """
    # Exact squared distances as far as they matter: the lower envelope of parabolas, an axis at a time.
    far = np.float32(distance_mm**2 * 4 + 1)
    squared = np.where(mask, np.float32(0), far)
    for axis, size in enumerate(spacing_mm):
        nearest = squared.copy()
        for step in range(1, min(int(distance_mm / size), mask.shape[axis] - 1) + 1):
            cost = np.float32((step * size) ** 2)
            before = (slice(None),) * axis + (slice(None, -step),)
            after = (slice(None),) * axis + (slice(step, None),)
            np.minimum(nearest[after], squared[before] + cost, out=nearest[after])
            np.minimum(nearest[before], squared[after] + cost, out=nearest[before])
        squared = nearest
    return squared <= np.float32(distance_mm**2 * (1 + 1e-6))


def _reduce(hu: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Means over blocks of voxels, float32; the last block of an axis may be smaller. One slab at a time."""
    starts = [np.arange(0, length, factor) for length, factor in zip(hu.shape, factors, strict=True)]
    reduced = np.empty([len(first) for first in starts], np.float32)
    rows = np.diff(starts[1], append=hu.shape[1]).astype(np.float32)[:, None]
    columns = np.diff(starts[2], append=hu.shape[2]).astype(np.float32)
    for target, first in zip(reduced, starts[0], strict=True):
        slab = hu[first : first + factors[0]].astype(np.float32)
        plane = np.maximum(slab, -1024).mean(axis=0)
        plane = np.add.reduceat(np.add.reduceat(plane, starts[1], axis=0), starts[2], axis=1)
        np.divide(plane, rows * columns, out=target)
    return reduced
