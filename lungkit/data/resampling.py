"""Separable resampling between grids that cover the same field of view.

New voxel j of m takes its value at (j + 1/2) n/m - 1/2 of n old voxels, the convention of
``torch.nn.functional.interpolate(align_corners=False)``.
"""

from __future__ import annotations

import numpy as np
import torch


def resample_linear(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resample float32 ``array`` to ``shape``, linearly, one axis after the other.

    Along an axis that becomes coarser by r = n/m the triangle filter is widened by r, which averages over
    the voxels that fall together instead of skipping some (as torch's ``antialias=True``, which exists for
    2D only). Beyond the edge the filter is cut and its weights are renormalised.

    Example:
        >>> resample_linear(np.array([0.0, 2.0], np.float32), (4,)).tolist()
        [0.0, 0.5, 1.5, 2.0]
    """
    result = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    # Coarser axes first: the others then have fewer voxels to work on.
    order = sorted(range(array.ndim), key=lambda axis: shape[axis] / array.shape[axis])
    for axis in order:
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
    index, weight = _taps(tensor.shape[axis], new)
    result = torch.zeros(*tensor.shape[:axis], new, *tensor.shape[axis + 1 :])
    column = [-1 if dim == axis else 1 for dim in range(tensor.ndim)]
    for tap in range(index.shape[1]):
        taken = tensor.index_select(axis, torch.from_numpy(index[:, tap]))
        result.addcmul_(taken, torch.from_numpy(weight[:, tap]).view(column))
    return result


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Old voxels (new, T) that each new voxel is made of, and their weights (new, T), rows summing to 1."""
    ratio = old / new
    support = max(ratio, 1.0)
    centre = (np.arange(new) + 0.5) * ratio - 0.5
    first = np.floor(centre - support).astype(np.int64) + 1
    taps = int(np.ceil(2 * support)) + 1
    index = first[:, None] + np.arange(taps)
    weight = np.clip(1 - np.abs(index - centre[:, None]) / support, 0, None)
    weight[(index < 0) | (index >= old)] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    used = (weight > 0).any(axis=0)
    return np.clip(index, 0, old - 1)[:, used], weight[:, used].astype(np.float32)
