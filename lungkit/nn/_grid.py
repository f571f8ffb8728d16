"""Padding of an image to the grid that a network's strides divide, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Repeat the last voxels of x (B, C, *S) at the end of each axis up to the next multiple.

    Padding at the end alone keeps every coarse voxel over the fine voxels that it covers without padding.
    """
    missing = [-n % m for n, m in zip(x.shape[2:], multiple, strict=True)]
    if not any(missing):
        return x
    # F.pad counts from the last axis.
    widths = [width for amount in reversed(missing) for width in (0, amount)]
    return F.pad(x, widths, mode="replicate")


def crop_to(x: Tensor, size: Sequence[int], scale: Sequence[int]) -> Tensor:
    """The part of x, at ``scale`` voxels a coarse voxel, that covers an image of ``size``."""
    for axis, (n, s) in enumerate(zip(size, scale, strict=True), start=2):
        length = -(-n // s)
        if x.shape[axis] != length:
            x = x.narrow(axis, 0, length)
    return x
