"""Separable resampling between grids that cover the same field of view.

New voxel j of m takes its value at (j + 1/2) n/m - 1/2 of n old voxels, the convention of
``torch.nn.functional.interpolate(align_corners=False)``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F


def resample_linear(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resample float32 ``array`` to ``shape``, linearly, one axis after the other.

    Along an axis that becomes coarser by r = n/m the triangle filter is widened by r (torch's
    ``antialias=True``), which averages over the voxels that fall together instead of skipping some. Beyond
    the edge the filter is cut and its weights are renormalised.

    Example:
        >>> resample_linear(np.array([0.0, 2.0], np.float32), (4,)).tolist()
        [0.0, 0.5, 1.5, 2.0]
    """
    result = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    # Coarser axes first: the others then have fewer voxels to work on.
    for axis in sorted(range(array.ndim), key=lambda axis: shape[axis] / array.shape[axis]):
        if shape[axis] != array.shape[axis]:
            result = _resample_axis(result, axis, shape[axis])
    return result.numpy()


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


def _resample_axis(tensor: torch.Tensor, axis: int, new: int) -> torch.Tensor:
    """Resample one axis with torch's antialiased filter, which exists for images only: (outer, axis, inner)."""
    outer, inner = math.prod(tensor.shape[:axis]), math.prod(tensor.shape[axis + 1 :])
    if inner == 1:  # the last axis: a wide image of many rows is faster than many images one pixel wide
        image, size = tensor.reshape(1, 1, outer, -1), (outer, new)
    else:
        image, size = tensor.reshape(1, outer, -1, inner), (new, inner)
    result = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    return result.reshape(*tensor.shape[:axis], new, *tensor.shape[axis + 1 :])
