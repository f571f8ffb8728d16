"""Sizes of a network's input: checks, padding to the grid that the strides divide, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lungkit.errors import UsageError

_AXES = {2: "Y, X", 3: "Z, Y, X"}


def scales_of(strides: Sequence[tuple[int, ...]], dims: int) -> list[tuple[int, ...]]:
    """Fine voxels per voxel of each level, along each axis: the running product of the strides."""
    scales = [(1,) * dims]
    for stride in strides:
        scales.append(tuple(a * b for a, b in zip(scales[-1], stride, strict=True)))
    return scales


def check_image(x: Tensor, *, dims: int, channels: int, multiple: Sequence[int], padding: str) -> None:
    """Refuse an input of another rank or channel count, or of a size that ``padding`` does not allow."""
    axes = _AXES[dims]
    if x.dim() != dims + 2 or x.shape[1] != channels:
        raise UsageError(
            f"x must have shape (B, {channels}, {axes}) for a {dims}D network of {channels} input channels, "
            f"got {tuple(x.shape)}"
        )
    size = tuple(x.shape[2:])
    if 0 in size:
        raise UsageError(f"x must have one voxel or more along each of ({axes}), got size {size}")
    if padding == "error" and any(n % m for n, m in zip(size, multiple, strict=True)):
        raise UsageError(
            f"the size of x must be a multiple of {tuple(multiple)} along ({axes}), got {size}: resize or pad x, "
            f"or build the network with padding='auto'"
        )


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
    """The part of x, at ``scale`` voxels per coarse voxel, that covers an image of ``size``."""
    for axis, (n, s) in enumerate(zip(size, scale, strict=True), start=2):
        length = -(-n // s)
        if x.shape[axis] != length:
            x = x.narrow(axis, 0, length)
    return x
