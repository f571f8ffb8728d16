"""From a scan's own grid to the library's ZYX grid and back, right to the sub-voxel.

Orientation: the axes are permuted and flipped, never interpolated, into RAS+ (the nearest such orientation
for an oblique scan), then laid out as (Z, Y, X). Resampling: the new grid covers the same field of view,
voxel edge to voxel edge. With n voxels of spacing s along an axis and m voxels after, the centre of new
voxel j lies at (j + 1/2) n/m - 1/2 in units of old voxels (``align_corners=False``) and the new spacing is
n s / m.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lungkit.data.volume import Volume


@dataclass(frozen=True, eq=False)
class Geometry:
    """A scan's own grid, and the one on which a network sees it.

    ``original_shape`` (X, Y, Z) and ``affine`` are the scan's; axis i of the scan becomes axis ``axes[i]`` of
    R, A, S, flipped where ``flips[i]``; ``shape`` (Z, Y, X) and ``spacing_mm`` (Z, Y, X) are those after
    resampling.
    """

    original_shape: tuple[int, int, int]
    affine: np.ndarray
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    @property
    def oriented_shape(self) -> tuple[int, int, int]:
        """Shape (Z, Y, X) after reorientation, before resampling."""
        sizes = dict(zip(self.axes, self.original_shape, strict=True))
        return sizes[2], sizes[1], sizes[0]


def plan_geometry(volume: Volume, *, target_spacing_mm: tuple[float, float, float] | None = None) -> Geometry:
    """The grid of ``volume`` in RAS+ as ZYX, resampled to ``target_spacing_mm`` (z, y, x) or kept as it is.

    The number of voxels is the nearest whole one, so the spacing reached differs a little from the one asked
    for; :attr:`Geometry.spacing_mm` holds the one reached. An axis of a single voxel is left alone: one slice
    says nothing about the next.
    """
    from nibabel.orientations import io_orientation

    orientation = io_orientation(volume.affine)
    axes = tuple(int(axis) for axis in orientation[:, 0])
    spacing_by_axis = dict(zip(axes, volume.spacing_mm, strict=True))
    native = Geometry(
        original_shape=volume.array.shape,
        affine=volume.affine,
        axes=axes,  # type: ignore[arg-type]
        flips=tuple(bool(flip < 0) for flip in orientation[:, 1]),  # type: ignore[arg-type]
        shape=(0, 0, 0),
        spacing_mm=(spacing_by_axis[2], spacing_by_axis[1], spacing_by_axis[0]),
    )
    shape, spacing = list(native.oriented_shape), list(native.spacing_mm)
    if target_spacing_mm is not None:
        for axis, target in enumerate(target_spacing_mm):
            if shape[axis] > 1:
                extent_mm = shape[axis] * spacing[axis]
                shape[axis] = max(1, round(extent_mm / target))
                spacing[axis] = extent_mm / shape[axis]
    return Geometry(
        original_shape=native.original_shape,
        affine=native.affine,
        axes=native.axes,
        flips=native.flips,
        shape=(shape[0], shape[1], shape[2]),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
    )


def orient(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    """View of ``array`` (X, Y, Z as stored) in RAS+ as (Z, Y, X).

    What is written to it lies where it belongs on the scan's own grid:

        >>> scan = Volume(np.arange(24).reshape(2, 3, 4), np.diag([-1.0, 1.0, 2.5, 1.0]))
        >>> mask = np.zeros(scan.array.shape, bool)
        >>> orient(mask, plan_geometry(scan))[0, 0] = True
        >>> scan.array[mask].tolist()
        [0, 12]
    """
    array = array[tuple(slice(None, None, -1) if flip else slice(None) for flip in geometry.flips)]
    return array.transpose(np.argsort(geometry.axes)).transpose(2, 1, 0)
