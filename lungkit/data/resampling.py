"""Separable resampling between grids that cover the same field of view.

New voxel j of m takes its value at (j + 1/2) n/m - 1/2 of n old voxels, the convention of
``torch.nn.functional.interpolate(align_corners=False)``. Images take the triangle filter, which along an axis that
becomes coarser by r = n/m is widened by r (torch's ``antialias=True``): it averages over the voxels that fall together
instead of skipping some. Beyond the edge the filter is cut and its weights are renormalised. Labels take the nearest
voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def linear_weights(old: int, new: int, first: int, last: int) -> tuple[int, int, Tensor]:
    """How new slices ``first`` to ``last`` - 1 of ``new`` are made of the ``old`` ones.

    Returns:
        ``(low, high, weights)``: new slice j is the sum over i of ``weights[j - first, i - low]`` times old slice i;
        float32 (last - first, high - low).

    Example:
        >>> linear_weights(2, 4, 1, 3)
        (0, 2, tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]]))
    """
    starts, weights = _filters(old, new)
    low = starts[first]
    high = starts[last - 1] + len(weights[last - 1])
    matrix = torch.zeros(last - first, high - low)
    for row in range(first, last):
        at = starts[row] - low
        matrix[row - first, at : at + len(weights[row])] = torch.from_numpy(weights[row])
    return low, high, matrix


@lru_cache(maxsize=8)
def _filters(old: int, new: int) -> tuple[list[int], list[np.ndarray]]:
    scale = old / new
    support = max(scale, 1.0)
    starts, weights = [], []
    for row in range(new):
        centre = scale * (row + 0.5)
        start = max(int(centre - support + 0.5), 0)
        stop = min(int(centre + support + 0.5), old)
        values = np.maximum(0.0, 1.0 - np.abs((np.arange(start, stop) + 0.5 - centre) / support))
        inside = np.flatnonzero(values)
        values = values[inside[0] : inside[-1] + 1]
        starts.append(start + int(inside[0]))
        weights.append((values / values.sum()).astype(np.float32))
    return starts, weights


def resample_plane(slices: Tensor, size: Sequence[int]) -> Tensor:
    """(C, n, Y, X) with every slice resampled to ``size`` (Y, X)."""
    if tuple(slices.shape[2:]) == tuple(size):
        return slices
    return F.interpolate(slices, list(size), mode="bilinear", align_corners=False, antialias=True)


def resample_nearest(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resample ``array`` to ``shape`` by the nearest voxel centre (torch's ``nearest-exact``); any dtype.

    Example:
        >>> resample_nearest(np.array([3, 7]), (4,)).tolist()
        [3, 3, 7, 7]
    """
    for axis, (old, new) in enumerate(zip(array.shape, shape, strict=True)):
        if old != new:
            # Integer arithmetic: floor((j + 1/2) n/m), with no rounding to go wrong at ties.
            index = (2 * np.arange(new, dtype=np.int64) + 1) * old // (2 * new)
            array = np.take(array, index, axis=axis)
    return array
