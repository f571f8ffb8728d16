"""Separable resampling between grids that cover the same field of view.

New voxel j of m takes its value at (j + 1/2) n/m - 1/2 of n old voxels, the convention of
``torch.nn.functional.interpolate(align_corners=False)``. Images take the triangle filter, which along an axis that
becomes coarser by r = n/m is widened by r (torch's ``antialias=True``): it averages over the voxels that fall together
instead of skipping some. Beyond the edge the filter is cut and its weights are renormalised. Labels take the nearest
voxel.

Models of other programs were trained on images that these resampled: with the "cubic" interpolating B-spline, "linear"
without widening, or the "nearest" voxel, each of which repeats the outermost voxel beyond the edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Filter = Literal["triangle", "linear", "cubic", "nearest"]
"""How new voxels are made of old ones along an axis."""

FILTERS: tuple[Filter, ...] = ("triangle", "linear", "cubic", "nearest")

# The cubic B-spline's inverse filter is sqrt(3) z^|k|: from here on it adds less than float32 resolves.
_POLE = 3**0.5 - 2
_REACH = 15
_NOTHING = 1e-8
_ROWS = 64


def axis_weights(
    old: int, new: int, first: int, last: int, filter: Filter = "triangle"
) -> tuple[int, int, Tensor]:
    """How new slices ``first`` to ``last`` - 1 of ``new`` are made of the ``old`` ones.

    Returns:
        ``(low, high, weights)``: new slice j is the sum over i of ``weights[j - first, i - low]`` times old slice i;
        float32 (last - first, high - low).

    Example:
        >>> axis_weights(2, 4, 1, 3)
        (0, 2, tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]]))
    """
    starts, weights = _weights_of_all(old, new, filter)
    low = min(starts[first:last])
    high = max(starts[row] + len(weights[row]) for row in range(first, last))
    matrix = torch.zeros(last - first, high - low)
    for row in range(first, last):
        at = starts[row] - low
        matrix[row - first, at : at + len(weights[row])] = torch.from_numpy(weights[row])
    return low, high, matrix


@lru_cache(maxsize=16)
def _weights_of_all(old: int, new: int, filter: Filter) -> tuple[list[int], list[np.ndarray]]:
    if filter == "triangle":
        return _triangles(old, new)
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    if filter == "nearest":
        voxels = np.floor(centres + 0.5).astype(int)[:, None]
        weights = np.ones((new, 1))
    elif filter == "linear":
        voxels = np.floor(centres).astype(int)[:, None] + np.arange(2)
        weights = 1 - np.abs(voxels - centres[:, None])
    else:
        voxels, weights = _cubic(centres)
    starts, rows = [], []
    for index, values in zip(np.clip(voxels, 0, old - 1), weights, strict=True):
        row = np.bincount(index - index[0], weights=values)
        kept = np.flatnonzero(np.abs(row) > _NOTHING)
        row = row[kept[0] : kept[-1] + 1]
        starts.append(int(index[0] + kept[0]))
        rows.append((row / row.sum()).astype(np.float32))
    return starts, rows


def _cubic(centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels round each centre and their weights in the cubic B-spline that passes through all voxels."""
    base = np.floor(centres).astype(int)[:, None]
    knots = base + np.arange(-1, 3)
    distance = np.abs(knots - centres[:, None])
    spline = np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, (2 - distance) ** 3 / 6)
    voxels = base + np.arange(-_REACH, _REACH + 2)
    inverse = 3**0.5 * _POLE ** np.abs(knots[:, :, None] - voxels[:, None, :])
    return voxels, np.einsum("rk,rkv->rv", spline, inverse)


def _triangles(old: int, new: int) -> tuple[list[int], list[np.ndarray]]:
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


def resample_plane(
    slices: Tensor, size: Sequence[int], filters: tuple[Filter, Filter] = ("triangle", "triangle")
) -> Tensor:
    """(C, n, Y, X) with every slice resampled to ``size`` (Y, X), by a filter for each of its axes."""
    if tuple(slices.shape[2:]) == tuple(size):
        return slices
    if filters in (("triangle", "triangle"), ("linear", "linear")):
        return F.interpolate(
            slices, list(size), mode="bilinear", align_corners=False, antialias=filters[0] == "triangle"
        )
    slices = _resample_axis(slices.transpose(2, 3), size[1], filters[1]).transpose(2, 3)
    return _resample_axis(slices, size[0], filters[0])


def _resample_axis(slices: Tensor, new: int, filter: Filter) -> Tensor:
    """(C, n, Y, X) with ``new`` rows."""
    old = slices.shape[2]
    if old == new:
        return slices
    parts = []
    for first in range(0, new, _ROWS):
        low, high, weights = axis_weights(old, new, first, min(first + _ROWS, new), filter)
        parts.append(weights.to(slices.device) @ slices[:, :, low:high])
    return torch.cat(parts, 2)


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
