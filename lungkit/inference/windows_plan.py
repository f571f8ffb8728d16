"""Which windows a scan is cut into, and smaller ones where memory is short."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lungkit.inference.sliding_window import window_starts
from lungkit.inference.trained_model import TrainedModel

_SMALLEST = 32

# Measured on a CPU with 1 MiB of L2 a core: small windows take a third less time a voxel some at a time, but bf16 takes
# more again where the features of a call leave the cache, as those of one slice of 512 x 512 do not. A GPU wants to be
# filled.
_VOXELS_PER_CALL = {"cpu": 1 << 18, "cuda": 1 << 22}


@dataclass(frozen=True)
class Tile:
    """Size of the windows: (Y, X) for a 2D network, which takes slices whole where it can, else (Z, Y, X)."""

    patch_size: tuple[int, ...]
    whole_slices: bool

    @classmethod
    def of(cls, model: TrainedModel) -> Tile:
        """The windows of a model: whole slices in 2D, the patches of its training in 3D."""
        return cls(model.patch_size, model.dims == 2)

    @property
    def depth(self) -> int:
        """Slices in a window."""
        return self.patch_size[0] if len(self.patch_size) == 3 else 1


def smaller_tiles(tile: Tile, shape: Sequence[int], halvings: int) -> Tile:
    """The tile with its longest axis halved ``halvings`` times, down to 32 voxels; whole slices are cut up first.

    Example:
        >>> smaller_tiles(Tile((64, 128, 128), False), (100, 512, 512), 1).patch_size
        (64, 64, 64)
        >>> smaller_tiles(Tile((96, 96), True), (100, 512, 512), 1)
        Tile(patch_size=(256, 256), whole_slices=False)
    """
    if halvings == 0:
        return tile
    size = list(shape[1:] if tile.whole_slices else tile.patch_size)
    for _ in range(halvings):
        longest = max(size)
        if longest < 2 * _SMALLEST:
            break
        size = [entry // 2 if entry == longest else entry for entry in size]
    return replace(tile, patch_size=tuple(size), whole_slices=False)


def windows_per_call(device_type: str, voxels: int) -> int:
    """How many windows of so many voxels a device takes at once, at least one.

    Example:
        >>> windows_per_call("cpu", 128 * 128), windows_per_call("cpu", 512 * 512), windows_per_call("cuda", 512 * 512)
        (16, 1, 16)
    """
    return max(1, _VOXELS_PER_CALL.get(device_type, _VOXELS_PER_CALL["cpu"]) // max(1, voxels))


def windows_of(shape: Sequence[int], tile: Tile, overlap: float) -> int:
    """Number of windows over a scan of ``shape`` (Z, Y, X).

    Example:
        >>> windows_of((10, 512, 512), Tile((96, 96), True), 0.5)
        10
    """
    if tile.whole_slices:
        return shape[0]
    patch = (tile.depth, *tile.patch_size[-2:])
    return math.prod(len(window_starts(n, p, overlap=overlap)) for n, p in zip(shape, patch, strict=True))
