"""From a scan's own grid to the library's ZYX grid and back, right to the sub-voxel.

Orientation: the axes are permuted and flipped, never interpolated, into RAS+ (the nearest such orientation
for an oblique scan), then laid out as (Z, Y, X). Resampling: the new grid covers the same field of view,
voxel edge to voxel edge. With n voxels of spacing s along an axis and m voxels after, the centre of new
voxel j lies at (j + 1/2) n/m - 1/2 in units of old voxels (``align_corners=False``) and the new spacing is
n s / m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lungkit.data.volume import Volume
from lungkit.errors import DataError, UsageError

SAME_PLACE_MM = 1e-3
"""Largest difference between the entries of two affines of one grid."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """A scan's own grid, and the one on which a network sees it.

    ``original_shape`` (X, Y, Z) and ``affine`` are the scan's; axis i of the scan becomes axis ``axes[i]`` of
    X, Y, Z (R, A, S but for other :class:`Axes`), flipped where ``flips[i]``; ``shape`` (Z, Y, X) and ``spacing_mm``
    (Z, Y, X) are those after resampling.
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


@dataclass(frozen=True)
class Axes:
    """In what order and direction a network sees the axes of a scan.

    ``orientation`` is "RAS", or "stored" for the order and direction in which the file holds them, by which programs go
    that do not reorient. Laid out as (Z, Y, X), the last stored axis first, they are taken in the order ``order``.

    Example:
        >>> scan = Volume(np.zeros((4, 5, 6)), np.diag([-1.0, 1.0, 3.0, 1.0]))
        >>> plan_geometry(scan, axes=Axes("stored", (1, 0, 2))).shape
        (5, 6, 4)
    """

    orientation: Literal["RAS", "stored"] = "RAS"
    order: tuple[int, int, int] = (0, 1, 2)

    def __post_init__(self) -> None:
        if self.orientation not in ("RAS", "stored") or sorted(self.order) != [0, 1, 2]:
            raise UsageError(
                f"axes: orientation {self.orientation!r} must be 'RAS' or 'stored', order {self.order} a permutation "
                "of 0, 1, 2"
            )


RAS = Axes()


def plan_geometry(
    volume: Volume,
    *,
    target_spacing_mm: tuple[float | None, float, float] | None = None,
    axes: Axes = RAS,
) -> Geometry:
    """The grid of ``volume`` as ZYX, resampled to ``target_spacing_mm`` (z, y, x) or kept as it is.

    ``axes`` says in which order and direction the axes are taken, RAS+ if nothing else is said. A target of None for z
    keeps the distance of the slices. The number of voxels is the nearest whole one, so the spacing reached differs a
    little from the one asked for; :attr:`Geometry.spacing_mm` holds the one reached. An axis of a single voxel is left
    alone: one slice says nothing about the next.
    """
    from nibabel.orientations import io_orientation

    stored = axes.orientation == "stored"
    orientation = np.array([(0, 1), (1, 1), (2, 1)]) if stored else io_orientation(volume.affine)
    # Axis 2 - n of R, A, S (or of the file) is axis n of ZYX, which the network may see as another one.
    turned = tuple(2 - axes.order.index(2 - int(axis)) for axis in orientation[:, 0])
    spacing_by_axis = dict(zip(turned, volume.spacing_mm, strict=True))
    native = Geometry(
        original_shape=volume.array.shape,
        affine=volume.affine,
        axes=turned,  # type: ignore[arg-type]
        flips=tuple(bool(flip < 0) for flip in orientation[:, 1]),  # type: ignore[arg-type]
        shape=(0, 0, 0),
        spacing_mm=(spacing_by_axis[2], spacing_by_axis[1], spacing_by_axis[0]),
    )
    shape, spacing = list(native.oriented_shape), list(native.spacing_mm)
    if target_spacing_mm is not None:
        for axis, target in enumerate(target_spacing_mm):
            if shape[axis] > 1 and target is not None:
                extent_mm = shape[axis] * spacing[axis]
                ratio = extent_mm / target
                if not math.isfinite(ratio):
                    raise DataError(
                        f"{volume.path or 'the scan'}: {extent_mm:g} mm cannot be resampled to {target:g} mm"
                    )
                shape[axis] = max(1, round(ratio))
                spacing[axis] = extent_mm / shape[axis]
    return Geometry(
        original_shape=native.original_shape,
        affine=native.affine,
        axes=native.axes,
        flips=native.flips,
        shape=(shape[0], shape[1], shape[2]),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
    )


def check_size(volume: Volume, geometry: Geometry, max_voxels: int) -> None:
    """Refuse a grid that is too large before anything of its size is made.

    Raises:
        DataError: more than ``max_voxels`` voxels; with their number, and the spacing before and after.
    """
    voxels = math.prod(geometry.shape)
    if voxels <= max_voxels:
        return
    own, target = (
        " x ".join(f"{size:g}" for size in sizes)
        for sizes in (plan_geometry(volume).spacing_mm, geometry.spacing_mm)
    )
    before, after = (" x ".join(map(str, shape)) for shape in (geometry.oriented_shape, geometry.shape))
    raise DataError(
        f"{volume.path or 'the scan'}: {before} voxels of {own} mm (z, y, x) are resampled to {target} mm: {after} = "
        f"{voxels} voxels, more than max_voxels = {max_voxels}; correct the spacing in the header, crop the scan or "
        "raise max_voxels"
    )


def orient(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    """View of ``array`` (X, Y, Z as stored) in the axes of ``geometry`` (RAS+) as (Z, Y, X).

    What is written to it lies where it belongs on the scan's own grid:

        >>> scan = Volume(np.arange(24).reshape(2, 3, 4), np.diag([-1.0, 1.0, 2.5, 1.0]))
        >>> mask = np.zeros(scan.array.shape, bool)
        >>> orient(mask, plan_geometry(scan))[0, 0] = True
        >>> scan.array[mask].tolist()
        [0, 12]
    """
    array = array[tuple(slice(None, None, -1) if flip else slice(None) for flip in geometry.flips)]
    return array.transpose(np.argsort(geometry.axes)).transpose(2, 1, 0)


def on_grid_of(volume: Volume, reference: Volume) -> Volume:
    """``volume`` with its axes in the order and direction of ``reference``, whose voxels it must share.

    Programs store one grid in several orientations (LPS, RAS, ...): axes are permuted and flipped, nothing is
    interpolated. Where sform and qform of the reference lie apart, it is enough that ``volume`` fits one of them:
    programs that go by the qform write masks there.

    Args:
        volume: a mask, or another channel.
        reference: the scan.

    Returns:
        ``volume`` on the grid of ``reference`` (its voxels a view where it was turned).

    Raises:
        DataError: it lies on other voxels; says which size or place differs and by how much.

    Example:
        >>> scan = Volume(np.zeros((2, 3, 4)), np.diag([1.0, 1.0, 2.5, 1.0]))
        >>> turned = np.diag([-1.0, 1.0, 2.5, 1.0])
        >>> turned[0, 3] = 1.0
        >>> mask = Volume(np.arange(24).reshape(2, 3, 4), turned)
        >>> bool((on_grid_of(mask, scan).array == mask.array[::-1]).all())
        True
    """
    found = None
    for wanted in _affines(reference):
        turn = _turn(volume.affine, wanted)
        if turn is None:
            continue
        axes, flips = turn
        array = volume.array.transpose(axes)
        array = array[tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)]
        if array.shape != reference.array.shape:
            continue
        apart = float(np.abs(_turned(volume, axes, flips) - wanted).max())
        if apart <= SAME_PLACE_MM:
            # The header's fields speak of the axes as they were.
            return replace(volume, array=array, affine=reference.affine, space=None)
        found = apart if found is None else min(found, apart)
    raise _other_grid(volume, reference, found)


def _affines(volume: Volume) -> list[np.ndarray]:
    """The affine of a volume, and those that other programs may read from its header where they only shift it."""
    others = volume.space.alternatives(volume.array.shape) if volume.space is not None else []
    return [
        volume.affine,
        *(other for other in others if np.allclose(other[:3, :3], volume.affine[:3, :3], atol=SAME_PLACE_MM)),
    ]


def _turn(own: np.ndarray, wanted: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, ...]] | None:
    """Axis of ``own`` for each axis of ``wanted``, and whether it runs the other way; None for another direction."""
    steps = np.linalg.solve(own[:3, :3], wanted[:3, :3])
    whole = np.rint(steps)
    if not np.isfinite(steps).all() or not np.array_equal(np.abs(whole) @ np.ones(3), np.ones(3)):
        return None
    if not np.array_equal(np.ones(3) @ np.abs(whole), np.ones(3)):
        return None
    first, second, third = (int(axis) for axis in np.abs(whole).argmax(axis=0))
    return (first, second, third), tuple(bool(flip) for flip in whole.sum(axis=0) < 0)


def _turned(volume: Volume, axes: tuple[int, int, int], flips: tuple[bool, ...]) -> np.ndarray:
    affine, shape = volume.affine, volume.array.shape
    turned = affine.copy()
    for target, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        turned[:3, target] = -affine[:3, axis] if flip else affine[:3, axis]
        if flip:
            turned[:3, 3] += affine[:3, axis] * (shape[axis] - 1)
    return turned


def _other_grid(volume: Volume, reference: Volume, apart: float | None) -> DataError:
    name, other = volume.path or "the volume", reference.path or "the scan"
    if volume.array.shape != reference.array.shape and apart is None:
        return DataError(
            f"{name}: shape {volume.array.shape}, but {other} has {reference.array.shape}; both must lie on one grid: "
            "resample one onto the other"
        )
    difference = float(np.abs(volume.affine - reference.affine).max()) if apart is None else apart
    return DataError(
        f"{name}: affine {_rows(volume.affine)} differs by {difference:g} from {_rows(reference.affine)} of {other}, "
        "in whatever order and direction the axes are taken; both must lie on one grid: resample one onto the other, "
        "or correct the header of the one that is wrong"
    )


def _rows(affine: np.ndarray) -> str:
    return "[" + "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3]) + "]"
