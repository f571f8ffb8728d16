"""Volumes as text in a page: cropped, halved where they are large, packed, compressed, base64.

The browser undoes it in ``assets/volumes.js``. A grey value is coded as the difference from its neighbour along x,
folded to a number without a sign (zigzag), low bytes before high bytes: the noise of a CT then compresses by about a
quarter better than the values do.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from isal import igzip

from lungkit.errors import UsageError

MAX_VOXELS = 2**25
"""Grey values of a scan kept at full resolution; more are halved (512 x 512 x 128 voxels, about 30 MB of page)."""

_HU = (-1024, 3071)
_AIR_BELOW_HU = -200  # no other unit of CT files goes so far below zero
_LEVEL = 3  # of igzip: a second for a chest CT


@dataclass(frozen=True)
class PackedVolume:
    """A volume in a page, on the grid of the scan or on a coarser one.

    Voxel (x, y, z) of ``shape`` covers ``factor`` voxels of the scan along every axis, from ``(offset + x) * factor``
    on; its value is ``scale * stored + intercept``.
    """

    text: str
    """base64 of gzip."""
    coding: str
    """"i16" or "u8"."""
    shape: tuple[int, int, int]
    """(x, y, z)"""
    factor: tuple[int, int, int] = (1, 1, 1)
    offset: tuple[int, int, int] = (0, 0, 0)
    scale: float = 1.0
    intercept: float = 0.0

    def to_dict(self, identifier: str) -> dict[str, object]:
        """What the browser must know to read the block ``identifier``, which holds :attr:`text`."""
        return {
            "block": identifier,
            "coding": self.coding,
            "shape": list(self.shape),
            "factor": list(self.factor),
            "offset": list(self.offset),
            "scale": self.scale,
            "intercept": self.intercept,
        }


def is_hounsfield(image: np.ndarray) -> bool:
    """Whether grey values look like HU: air is far below zero in no other unit of CT files."""
    return bool(image.min() < _AIR_BELOW_HU)


def halving(shape: Sequence[int], spacing_mm: Sequence[float], max_voxels: int) -> tuple[int, int, int]:
    """By how much every axis is reduced so that at most ``max_voxels`` remain: the finest axes are halved first.

    Args:
        shape: of the scan.
        spacing_mm: of the same axes.
        max_voxels: that may remain.

    Example:
        >>> halving((512, 512, 300), (0.7, 0.7, 1.0), 2**25), halving((512, 512, 200), (0.7, 0.7, 5.0), 2**25)
        ((2, 2, 2), (2, 2, 1))
    """
    if max_voxels < 1:
        raise UsageError(f"max_voxels must be at least 1, got {max_voxels}")
    factor = [1, 1, 1]
    while math.prod(-(-size // step) for size, step in zip(shape, factor, strict=True)) > max_voxels:
        open_axes = [axis for axis in range(3) if shape[axis] > factor[axis]]
        sizes = {axis: spacing_mm[axis] * factor[axis] for axis in open_axes}
        finest = min(sizes.values())
        for axis, size in sizes.items():
            if size < 1.5 * finest:
                factor[axis] *= 2
    return factor[0], factor[1], factor[2]


def pack_image(
    image: np.ndarray, spacing_mm: Sequence[float], *, max_voxels: int = MAX_VOXELS
) -> PackedVolume:
    """Pack a scan (Z, Y, X) as int16: HU as they are from -1024 to 3071, other units over the range that they have.

    Args:
        image: grey values.
        spacing_mm: (z, y, x).
        max_voxels: above these it is halved, by the mean of the voxels that become one.
    """
    factor = halving(image.shape, spacing_mm, max_voxels)
    low, high = float(image.min()), float(image.max())
    scale, intercept = 1.0, 0.0
    whole = image.dtype.kind in "iub" and low >= -(2**15) and high < 2**15
    if not whole and not is_hounsfield(image):
        scale, intercept = max(high - low, 1e-12) / 32767, low
    limits = _HU if is_hounsfield(image) else (-(2**15), 2**15 - 1)
    small = np.empty([-(-size // step) for size, step in zip(image.shape, factor, strict=True)], np.int16)
    for z, plane in enumerate(small):
        values = _mean_plane(image[z * factor[0] : (z + 1) * factor[0]], factor)
        plane[:] = np.clip(np.rint((values - intercept) / scale), *limits)
    return PackedVolume(
        _compressed(_differences(small)), "i16", _xyz(small.shape), _xyz(factor), (0, 0, 0), scale, intercept
    )


def pack_mask(mask: np.ndarray) -> PackedVolume:
    """Pack class indices (Z, Y, X) as uint8, cropped to what is not 0, at full resolution however large the scan is."""
    if mask.size and (mask.min() < 0 or mask.max() > 255):
        raise UsageError(f"a mask holds values from {mask.min()} to {mask.max()}; a page takes 0 to 255")
    hits = [np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    box = tuple(slice(int(hit[0]), int(hit[-1]) + 1) if len(hit) else slice(0, 0) for hit in hits)
    part = np.ascontiguousarray(mask[box], np.uint8)
    offset = _xyz([side.start for side in box])
    return PackedVolume(_compressed(part.tobytes()), "u8", _xyz(part.shape), (1, 1, 1), offset)


def pack_map(
    values: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    limits: tuple[float, float] = (0.0, 1.0),
    max_voxels: int = MAX_VOXELS,
) -> PackedVolume:
    """Pack a map (Z, Y, X), as of probabilities, as uint8 over ``limits``; halved as :func:`pack_image` does."""
    factor = halving(values.shape, spacing_mm, max_voxels)
    low, high = limits
    small = np.empty([-(-size // step) for size, step in zip(values.shape, factor, strict=True)], np.uint8)
    for z, plane in enumerate(small):
        mean = _mean_plane(values[z * factor[0] : (z + 1) * factor[0]], factor)
        plane[:] = np.clip(np.rint((np.nan_to_num(mean) - low) / (high - low) * 255), 0, 255)
    scale = (high - low) / 255
    return PackedVolume(
        _compressed(small.tobytes()), "u8", _xyz(small.shape), _xyz(factor), (0, 0, 0), scale, low
    )


def _mean_plane(slab: np.ndarray, factor: Sequence[int]) -> np.ndarray:
    """Mean over blocks of ``factor`` voxels of a slab (at most factor[0], Y, X); blocks at the border are smaller."""
    plane = slab[0].astype(np.float32) if len(slab) == 1 else slab.mean(axis=0, dtype=np.float32)
    for axis, step in enumerate(factor[1:]):
        if step > 1:
            starts = np.arange(0, plane.shape[axis], step)
            counts = np.diff(np.append(starts, plane.shape[axis])).astype(np.float32)
            summed = np.add.reduceat(plane, starts, axis=axis)
            plane = summed / (counts[:, None] if axis == 0 else counts)
    return plane


def _differences(values: np.ndarray) -> bytes:
    """int16 (Z, Y, X) as zigzag differences along x, all low bytes before all high bytes."""
    with np.errstate(over="ignore"):
        steps = values.copy()
        steps[..., 1:] -= values[..., :-1]  # wraps, and the browser wraps back
        folded = ((steps << 1) ^ (steps >> 15)).view(np.uint16)
    return (folded & 255).astype(np.uint8).tobytes() + (folded >> 8).astype(np.uint8).tobytes()


def _compressed(data: bytes) -> str:
    return base64.b64encode(igzip.compress(data, _LEVEL)).decode("ascii")


def _xyz(zyx: Sequence[int]) -> tuple[int, int, int]:
    return int(zyx[2]), int(zyx[1]), int(zyx[0])
