"""The nodule at a place that somebody pointed at, with a model of crops round nodules."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungkit.data.geometry import Geometry, orient, plan_geometry
from lungkit.data.volume import Volume
from lungkit.errors import DataError, UsageError
from lungkit.inference.predictor import Prediction, Predictor

CROP_PIXELS = 128
"""Side of the square that a network of crops is shown, at the scan's own pixels."""
REACH_MM = 10.0
"""How far from the point the nearest voxel of its nodule may lie."""
_FIRST_MM, _FURTHEST_MM = 20.0, 80.0
"""Half the height of the crop, which doubles while the nodule reaches its end."""
_SHIFT_MM = 3.0
"""Between a click and those that the stability is taken from."""
_BALL_MM = 3.0
_HU_BELOW = -500.0  # other intensities do not go so far below zero


@dataclass(frozen=True)
class PointedNodule:
    """What lies at one point.

    ``point_ras_mm`` is the point (or the middle of the box) in mm to the right, front and head. ``found`` says whether
    there is a nodule; ``reason`` why not. ``number`` is its value in the mask. ``stability`` is the mean Dice of its
    mask with those of four clicks 3 mm to each side, NaN where it was not asked for.
    """

    number: int
    point_ras_mm: tuple[float, float, float]
    found: bool
    reason: str = ""
    voxels: int = 0
    stability: float = math.nan


@dataclass(frozen=True, eq=False)
class PointedPrediction(Prediction):
    """A prediction whose classes are "nodule 1", "nodule 2", ... in the order of the points, those that were found."""

    nodules: tuple[PointedNodule, ...] = ()


@dataclass(frozen=True)
class Box:
    """Two opposite corners in mm to the right, front and head: the middle is the point, the walls are the limit."""

    first: tuple[float, float, float]
    second: tuple[float, float, float]

    @property
    def centre(self) -> tuple[float, float, float]:
        """Where the nodule is looked for."""
        x, y, z = ((one + other) / 2 for one, other in zip(self.first, self.second, strict=True))
        return x, y, z


def segment_at(
    predictor: Predictor,
    scan: Volume,
    points: Sequence[tuple[float, float, float] | Box],
    *,
    stability: bool = True,
) -> PointedPrediction:
    """Segment the nodule at each point of a scan.

    A square of 128 pixels round the point is cut from the slices within 20 mm of it (and further, while the nodule goes
    on), scaled as the model's training crops were (for a model of 8-bit crops from the smallest to the largest value of
    each slice), and predicted. The nodule is the 26-connected component at the point, or the one whose nearest voxel
    lies within 10 mm of it. Two points may share a nodule; it then has the number of the first.

    Args:
        predictor: one model or several, of one channel.
        scan: the whole scan.
        points: (x, y, z) in mm to the right, front and head (RAS, as nibabel's affines); or boxes, whose walls cut the
            nodule off. DICOM's coordinates (LPS) have the opposite sign in x and y.
        stability: repeat every click at four places round it.

    Raises:
        UsageError: a point outside of the scan, no point, or a model of several channels.
        DataError: the scan does not fit the model.

    Example:
        The nodule at 42 mm left, 18 mm front, 120 mm head::

            predictor = lungkit.Predictor.from_run(lungkit.inference.model_folder("lidc-nodules"))
            found = predictor.segment_at("ct.nii.gz", [(-42.0, 18.0, 120.0)])
            found.save("mask.nii.gz")
    """
    if len(predictor.models[0].channels) != 1:
        raise UsageError(f"model {predictor.models[0].name} takes several channels; pointing works with one")
    if not points:
        raise UsageError("points: at least one is needed")
    started = time.perf_counter()
    clicks = _Clicks(predictor, scan)
    centres = [point.centre if isinstance(point, Box) else point for point in points]
    places = [_place(centre, clicks.geometry, scan) for centre in centres]
    walls = [_walls(point, clicks.geometry) if isinstance(point, Box) else None for point in points]
    if clicks.lowest == clicks.highest:
        raise DataError(
            f"{scan.path or 'the scan'}: all voxels are {clicks.lowest:g}; there is nothing to point at"
        )
    mask = np.zeros(scan.array.shape, np.uint16 if len(points) > 255 else np.uint8)
    numbered = orient(mask, clicks.geometry)
    nodules = [
        _nodule(clicks, numbered, number, *where, stability)
        for number, where in enumerate(zip(centres, places, walls, strict=True), start=1)
    ]
    return PointedPrediction(
        mask=mask,
        affine=scan.affine,
        labels={"background": 0, **{f"nodule {one.number}": one.number for one in nodules if one.found}},
        seconds=time.perf_counter() - started,
        device=clicks.last.device,
        precision=clicks.last.precision,
        warnings=tuple(clicks.warnings),
        space=scan.space,
        nodules=tuple(nodules),
    )


Crop = tuple[slice, slice, slice]  # on the oriented grid


class _Clicks:
    """A scan that is clicked at."""

    last: Prediction

    def __init__(self, predictor: Predictor, scan: Volume) -> None:
        self.predictor, self.geometry = predictor, plan_geometry(scan)
        self.slices = orient(scan.array, self.geometry)
        self.lowest, self.highest = float(scan.array.min()), float(scan.array.max())
        self.warnings: dict[str, None] = {}

    def __call__(self, place: np.ndarray, half_mm: float, walls: Crop | None) -> tuple[Crop, np.ndarray]:
        """The crop round a voxel (Z, Y, X), and the nodule in it."""
        reach = max(1, math.ceil(half_mm / self.geometry.spacing_mm[0]))
        depth = slice(max(0, int(place[0]) - reach), min(len(self.slices), int(place[0]) + reach + 1))
        height, width = (_square(int(place[axis]), self.slices.shape[axis]) for axis in (1, 2))
        crop = (depth, height, width)
        self.last = self.predictor(_cropped(self.predictor, self.slices, crop, self.geometry))
        self.warnings.update(dict.fromkeys(self.last.warnings))
        foreground = self.last.mask.transpose(2, 1, 0) != 0
        if walls is not None:
            foreground = foreground & _within(walls, crop)
        corner = np.array([side.start for side in crop])
        return crop, _component(foreground, place - corner, self.geometry.spacing_mm)


def _nodule(
    clicks: _Clicks,
    numbered: np.ndarray,
    number: int,
    centre: tuple[float, float, float],
    place: np.ndarray,
    walls: Crop | None,
    stability: bool,
) -> PointedNodule:
    half_mm = _FIRST_MM
    while True:
        crop, inside = clicks(place, half_mm, walls)
        depth = crop[0]
        goes_on = (inside[0].any() and depth.start > 0) or (inside[-1].any() and depth.stop < len(numbered))
        if not goes_on or half_mm >= _FURTHEST_MM:
            break
        half_mm *= 2
    if not inside.any():
        return PointedNodule(number, centre, False, _why_nothing(clicks, place))
    free = inside & (numbered[crop] == 0)
    if not free.any():
        other = int(np.bincount(numbered[crop][inside]).argmax())
        return PointedNodule(number, centre, False, f"it lies in the nodule of point {other}")
    numbered[crop][free] = number
    agreement = _stability(clicks, place, crop, inside, walls) if stability else math.nan
    return PointedNodule(number, centre, True, "", int(free.sum()), agreement)


def _cropped(predictor: Predictor, slices: np.ndarray, crop: Crop, geometry: Geometry) -> Volume:
    """The crop as a scan of its own with the intensities that the model knows."""
    voxels = slices[crop]
    if predictor.models[0].preprocessing.channels[0].units == "8-bit":
        voxels = voxels.astype(np.float32)
        low = voxels.min(axis=(1, 2), keepdims=True)
        extent = np.maximum(voxels.max(axis=(1, 2), keepdims=True) - low, 1e-6)
        voxels = np.rint(255 * (voxels - low) / extent).astype(np.uint8)
    depth, height, width = geometry.spacing_mm
    return Volume(np.ascontiguousarray(voxels.transpose(2, 1, 0)), np.diag([width, height, depth, 1.0]))


def _component(foreground: np.ndarray, place: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """The component at the place, or the one nearest to it within reach."""
    import cc3d

    voxels = np.argwhere(foreground)
    if not len(voxels):
        return np.zeros(foreground.shape, bool)
    away = np.linalg.norm((voxels - place) * np.asarray(spacing_mm), axis=1)
    nearest = int(away.argmin())
    if away[nearest] > REACH_MM:
        return np.zeros(foreground.shape, bool)
    labels = cc3d.connected_components(np.ascontiguousarray(foreground).view(np.uint8), connectivity=26)
    found: np.ndarray = labels == labels[tuple(voxels[nearest])]
    return found


def _stability(
    clicks: _Clicks, place: np.ndarray, crop: Crop, inside: np.ndarray, walls: Crop | None
) -> float:
    """Mean Dice of the nodule with what clicks beside it give."""
    spacing, shape = clicks.geometry.spacing_mm, clicks.geometry.oriented_shape
    depth = np.flatnonzero(inside.any(axis=(1, 2))) + crop[0].start
    half_mm = (max(place[0] - depth[0], depth[-1] - place[0]) + 1) * spacing[0]
    own = _numbers(inside, crop, shape)
    scores = []
    for axis, side in itertools.product((1, 2), (-1, 1)):
        moved = place.copy()
        moved[axis] = np.clip(place[axis] + side * round(_SHIFT_MM / spacing[axis]), 0, shape[axis] - 1)
        other_crop, other = clicks(moved, half_mm, walls)
        found = _numbers(other, other_crop, shape)
        scores.append(2 * len(np.intersect1d(own, found, assume_unique=True)) / (len(own) + len(found)))
    return float(np.mean(scores))


def _numbers(inside: np.ndarray, crop: Crop, shape: tuple[int, int, int]) -> np.ndarray:
    """Flat index on the oriented grid of every voxel of a mask in a crop."""
    voxels = np.argwhere(inside) + [side.start for side in crop]
    numbers: np.ndarray = np.ravel_multi_index(tuple(voxels.T), shape)
    return numbers


def _square(centre: int, size: int) -> slice:
    """128 pixels round the centre, moved to lie in the scan; all of it where the scan is smaller."""
    length = min(CROP_PIXELS, size)
    start = min(max(0, centre - length // 2), size - length)
    return slice(start, start + length)


def _within(walls: Crop, crop: Crop) -> np.ndarray:
    inside = np.ones(tuple(side.stop - side.start for side in crop), bool)
    for axis, (wall, side) in enumerate(zip(walls, crop, strict=True)):
        index = np.arange(side.start, side.stop)
        keep = (index >= wall.start) & (index < wall.stop)
        inside &= keep.reshape([-1 if other == axis else 1 for other in range(3)])
    return inside


def _stored(point: tuple[float, float, float], affine: np.ndarray) -> np.ndarray:
    """Fractional index (X, Y, Z) of a point in mm."""
    index: np.ndarray = np.linalg.solve(affine, [*point, 1.0])[:3]
    return index


def _oriented(index: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Index (Z, Y, X) on the oriented grid of one on the scan's own."""
    turned = np.empty(3)
    for axis, flip, size, value in zip(
        geometry.axes, geometry.flips, geometry.original_shape, index, strict=True
    ):
        turned[2 - axis] = size - 1 - value if flip else value
    return turned


def _place(point: tuple[float, float, float], geometry: Geometry, scan: Volume) -> np.ndarray:
    """Voxel (Z, Y, X) on the oriented grid.

    Raises:
        UsageError: outside of the scan; says where the scan lies.
    """
    if len(point) != 3 or not all(math.isfinite(value) for value in point):
        raise UsageError(f"point {tuple(point)} must be three finite numbers, x, y, z in mm")
    index = _stored(point, scan.affine)
    size = np.array(scan.array.shape)
    if (index < -0.5).any() or (index > size - 0.5).any():
        corners = np.array(
            [[*corner, 1.0] for corner in itertools.product(*((-0.5, extent - 0.5) for extent in size))]
        )
        ends = (corners @ scan.affine.T)[:, :3]
        low, high = ends.min(axis=0), ends.max(axis=0)
        sides = ", ".join(
            f"{name} {first:.1f} to {last:.1f}" for name, first, last in zip("xyz", low, high, strict=True)
        )
        lps = ", ".join(
            f"{name} {first:.1f} to {last:.1f}"
            for name, first, last in zip(
                "xyz", (-high[0], -high[1], low[2]), (-low[0], -low[1], high[2]), strict=True
            )
        )
        raise UsageError(
            f"{scan.path or 'the scan'}: the point {_text(point)} mm (RAS) lies outside of the scan, which spans "
            f"{sides} mm in RAS ({lps} in LPS, DICOM's coordinates); give world coordinates in mm, not voxel numbers"
        )
    place: np.ndarray = np.rint(np.clip(_oriented(index, geometry), 0, np.array(geometry.oriented_shape) - 1))
    return place.astype(np.int64)


def _walls(box: Box, geometry: Geometry) -> Crop:
    corners = [
        _oriented(_stored((x, y, z), geometry.affine), geometry)
        for x, y, z in itertools.product(*zip(box.first, box.second, strict=True))
    ]
    low = np.ceil(np.min(corners, axis=0) - 1e-6).astype(int)
    high = np.floor(np.max(corners, axis=0) + 1e-6).astype(int) + 1
    if (high <= low).any():
        raise UsageError(
            f"box {_text(box.first)} to {_text(box.second)} mm holds no voxel; give two opposite corners"
        )
    depth, height, width = (slice(int(first), int(last)) for first, last in zip(low, high, strict=True))
    return depth, height, width


def _why_nothing(clicks: _Clicks, place: np.ndarray) -> str:
    reach = [int(_BALL_MM // step) for step in clicks.geometry.spacing_mm]
    ball = clicks.slices[
        tuple(slice(max(0, at - r), at + r + 1) for at, r in zip(place.tolist(), reach, strict=True))
    ]
    mean = float(ball.mean(dtype=np.float64))
    where = ""
    if clicks.lowest < _HU_BELOW:
        where = ": it lies in air" if mean < -950 else ": it lies in lung" if mean < -600 else ""
    return f"no nodule within {REACH_MM:g} mm of the point{where} (mean {mean:.0f} within {_BALL_MM:g} mm)"


def _text(point: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in point)
