"""Surface distances in plain numpy: the twin of ``csrc/geometry``, in use where that is not built."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def surface_distances(
    prediction: np.ndarray, truth: np.ndarray, *, spacing_mm: Sequence[float], labels: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every label the distances (prediction to truth, truth to prediction) in mm, float32.

    Boundary voxels are those with a face neighbour of another label, the outside of the volume included; distances
    between voxel centres are exact. A label absent on one side is infinitely far.
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    results = []
    for label in labels:
        boundaries = [_boundary(volume == label) for volume in (prediction, truth)]
        box = _box(boundaries[0] | boundaries[1])
        # A 2D image is a volume of one plane: its boundary is known, so that the extra axis changes nothing.
        first, second = (_as_volume(boundary[box]) for boundary in boundaries)
        steps = np.concatenate([np.ones(3 - spacing.size), spacing])
        results.append((_distances(first, second, steps), _distances(second, first, steps)))
    return results


def _boundary(mask: np.ndarray) -> np.ndarray:
    inside = mask.copy()
    padded = np.pad(mask, 1)
    centre = [slice(1, -1)] * mask.ndim
    for axis in range(mask.ndim):
        for side in (slice(0, -2), slice(2, None)):
            window = (*centre[:axis], side, *centre[axis + 1 :])
            inside &= padded[window]
    return mask & ~inside


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        hits = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1) if len(hits) else slice(0, 0))
    return tuple(box)


def _as_volume(boundary: np.ndarray) -> np.ndarray:
    return boundary.reshape((1,) * (3 - boundary.ndim) + boundary.shape)


def _distances(origin: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance of every voxel of ``origin`` to the nearest voxel of ``target``, in raster order.

    Squared distances separate: along y for all voxels, then along z for the rows that hold a voxel of ``origin``,
    then along x for those voxels alone. The last two search outwards and stop at the distance found so far.
    """
    voxels = np.argwhere(origin)
    if not len(voxels) or not target.any():
        return np.full(len(voxels), np.inf, np.float32)
    along_y = _line_distances(target, spacing[1]) ** 2
    rows, row_of = np.unique(voxels[:, :2], axis=0, return_inverse=True)
    row_of = row_of.reshape(-1)
    z, y = rows[:, 0], rows[:, 1]
    best = along_y[z, y]
    found = _nearest_in_rows(best, row_of, voxels[:, 2], spacing[2])
    for step in range(1, len(along_y)):
        offset = (step * spacing[0]) ** 2
        if offset >= found.max():
            break
        for side in (z - step, z + step):
            exists = (side >= 0) & (side < len(along_y))
            best[exists] = np.minimum(best[exists], along_y[side[exists], y[exists]] + offset)
        # The bound is brought up to date at 1, 2, 4, 8, ...: often enough to stop soon, rarely enough to cost little.
        if step & (step - 1) == 0:
            found = _nearest_in_rows(best, row_of, voxels[:, 2], spacing[2])
    found = _nearest_in_rows(best, row_of, voxels[:, 2], spacing[2])
    return np.sqrt(found).astype(np.float32)


def _line_distances(target: np.ndarray, spacing: float) -> np.ndarray:
    """Distance (Z, Y, X) to the nearest voxel of ``target`` in the same line along y."""
    y = np.arange(target.shape[1], dtype=np.float64)[None, :, None]
    before = np.maximum.accumulate(np.where(target, y, -np.inf), axis=1)
    after = np.minimum.accumulate(np.where(target, y, np.inf)[:, ::-1], axis=1)[:, ::-1]
    return np.minimum(y - before, after - y) * spacing


def _nearest_in_rows(rows: np.ndarray, row_of: np.ndarray, x: np.ndarray, spacing: float) -> np.ndarray:
    """The least rows[r, x'] + (x' - x)^2 spacing^2 over x', for every voxel (r, x)."""
    width = rows.shape[1]
    best = rows[row_of, x]
    for step in range(1, width):
        offset = (step * spacing) ** 2
        if offset >= best.max():
            break
        for side in (x - step, x + step):
            exists = (side >= 0) & (side < width)
            best[exists] = np.minimum(best[exists], rows[row_of[exists], side[exists]] + offset)
    return best
