"""The nodule at a place that somebody pointed at, with a model of crops round nodules."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungkit.data.geometry import Geometry, orient, plan_geometry
from lungkit.data.resampling import Filter, axis_weights
from lungkit.data.volume import Volume
from lungkit.errors import DataError, UsageError
from lungkit.inference.predictor import Prediction, Predictor
from lungkit.inference.world_points import Box, Crop, box_walls, voxel_at

CROP_PIXELS = 128
"""Side of the square that a network of crops is shown, at the scan's own pixels."""
WIDER_VIEWS = (1.5, 2.0, 3.0)
"""How many times as wide the further views of a point are, which are shrunk to the same square."""
REACH_MM = 10.0
"""How far from the point the nearest voxel of its nodule may lie."""
_FIRST_MM, _FURTHEST_MM = 20.0, 80.0
"""Half the height of the crop, which doubles while the nodule reaches its end."""
_SHIFT_MM = 3.0
"""Between a click and those that the stability is taken from."""
_BALL_MM = 3.0
_WIDEST_SHARE = 1 / 3  # of the view's side, that a nodule takes which needs no wider one
_LARGER = 1.25
_HU_BELOW = -500.0  # other intensities do not go so far below zero


@dataclass(frozen=True)
class PointedNodule:
    """What lies at one point.

    ``point_ras_mm`` is the point (or the middle of the box) in mm to the right, front and head. ``found`` says whether
    there is a nodule; ``reason`` why not. ``number`` is its value in the mask. ``stability`` is the mean Dice of its
    mask with those of four clicks 3 mm to each side, NaN where it was not asked for. ``view`` is the side of the square
    it was seen in, in multiples of 128 pixels.
    """

    number: int
    point_ras_mm: tuple[float, float, float]
    found: bool
    reason: str = ""
    voxels: int = 0
    stability: float = math.nan
    view: float = 1.0


@dataclass(frozen=True, eq=False)
class PointedPrediction(Prediction):
    """A prediction whose classes are "nodule 1", "nodule 2", ... in the order of the points, those that were found."""

    nodules: tuple[PointedNodule, ...] = ()


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

    A mass that fills the square looks like none of the training's nodules, and at most pieces of it are found. Where no
    component holds the point itself, or the one that does is wider than a third of the square, squares of 1.5, 2 and 3
    times the side are therefore looked at too, shrunk to 128 pixels, up to the first in which the component that holds
    the point is no wider than a third. It is taken where what was seen before did not hold the point, or was smaller by
    a fifth, with a warning: outlines of what is larger than the training's nodules are to be checked.

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
    places = [voxel_at(centre, clicks.geometry, scan) for centre in centres]
    walls = [box_walls(point, clicks.geometry) if isinstance(point, Box) else None for point in points]
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


class _Clicks:
    """A scan that is clicked at."""

    last: Prediction

    def __init__(self, predictor: Predictor, scan: Volume) -> None:
        self.predictor, self.geometry = predictor, plan_geometry(scan)
        self.slices = orient(scan.array, self.geometry)
        self.lowest, self.highest = float(scan.array.min()), float(scan.array.max())
        self.warnings: dict[str, None] = {}

    def __call__(
        self, place: np.ndarray, half_mm: float, walls: Crop | None, view: float = 1.0
    ) -> tuple[Crop, np.ndarray]:
        """The crop round a voxel (Z, Y, X), and the nodule in it."""
        reach = max(1, math.ceil(half_mm / self.geometry.spacing_mm[0]))
        depth = slice(max(0, int(place[0]) - reach), min(len(self.slices), int(place[0]) + reach + 1))
        side = round(CROP_PIXELS * view)
        height, width = (_square(int(place[axis]), self.slices.shape[axis], side) for axis in (1, 2))
        crop = (depth, height, width)
        self.last = self.predictor(_cropped(self.predictor, self.slices[crop], self.geometry, view))
        self.warnings.update(dict.fromkeys(self.last.warnings))
        foreground = self.last.mask.transpose(2, 1, 0) != 0
        if view > 1:
            foreground = _resized(foreground, self.slices[crop].shape, "linear") >= 0.5
        if walls is not None:
            foreground = foreground & _within(walls, crop)
        corner = np.array([side.start for side in crop])
        return crop, _component(foreground, place - corner, self.geometry.spacing_mm)

    def followed(self, place: np.ndarray, walls: Crop | None, view: float = 1.0) -> tuple[Crop, np.ndarray]:
        """The same in a crop that is made higher while the nodule reaches its end."""
        half_mm = _FIRST_MM
        while True:
            crop, inside = self(place, half_mm, walls, view)
            depth = crop[0]
            goes_on = (inside[0].any() and depth.start > 0) or (
                inside[-1].any() and depth.stop < len(self.slices)
            )
            if not goes_on or half_mm >= _FURTHEST_MM:
                return crop, inside
            half_mm *= 2


def _nodule(
    clicks: _Clicks,
    numbered: np.ndarray,
    number: int,
    centre: tuple[float, float, float],
    place: np.ndarray,
    walls: Crop | None,
    stability: bool,
) -> PointedNodule:
    view, crop, inside = _looked_at(clicks, place, walls)
    if not inside.any():
        return PointedNodule(number, centre, False, _why_nothing(clicks, place))
    free = inside & (numbered[crop] == 0)
    if not free.any():
        other = int(np.bincount(numbered[crop][inside]).argmax())
        return PointedNodule(number, centre, False, f"it lies in the nodule of point {other}")
    numbered[crop][free] = number
    agreement = _stability(clicks, place, crop, inside, walls, view) if stability else math.nan
    if view > 1:
        clicks.warnings[
            f"nodule {number} was found in a view {view:g} times as wide: it is larger than those of the model's "
            "training; look at its outline"
        ] = None
    return PointedNodule(number, centre, True, "", int(free.sum()), agreement, view)


def _looked_at(clicks: _Clicks, place: np.ndarray, walls: Crop | None) -> tuple[float, Crop, np.ndarray]:
    """The view in which the nodule is seen best, its crop, and the nodule in it."""
    seen = (1.0, *clicks.followed(place, walls))
    if _holds(seen, place) and _fits(seen):
        return seen
    for view in WIDER_VIEWS:
        wider = (view, *clicks.followed(place, walls, view))
        if not _holds(wider, place):
            continue
        if not _holds(seen, place) or wider[2].sum() > _LARGER * seen[2].sum():
            seen = wider
        if _fits(wider):
            break
    return seen


def _fits(seen: tuple[float, Crop, np.ndarray]) -> bool:
    view, _, inside = seen
    return _width(inside) <= CROP_PIXELS * view * _WIDEST_SHARE


def _holds(seen: tuple[float, Crop, np.ndarray], place: np.ndarray) -> bool:
    _, crop, inside = seen
    return bool(inside[tuple(place - [side.start for side in crop])])


def _width(inside: np.ndarray) -> int:
    """Pixels from end to end within the slices."""
    return max(int(np.ptp(np.flatnonzero(inside.any(axis=axes)))) + 1 for axes in ((0, 2), (0, 1)))


def _cropped(predictor: Predictor, voxels: np.ndarray, geometry: Geometry, view: float) -> Volume:
    """The crop as a scan of its own with the intensities that the model knows.

    What is seen in a wider view is shrunk and said to have the scan's own voxels, as a smaller nodule would.
    """
    if view > 1:
        factors = (view if predictor.models[0].dims == 3 else 1.0, view, view)
        shape = [max(1, round(size / factor)) for size, factor in zip(voxels.shape, factors, strict=True)]
        voxels = _resized(voxels, shape, "triangle")
    if predictor.models[0].preprocessing.channels[0].units == "8-bit":
        voxels = voxels.astype(np.float32)
        low = voxels.min(axis=(1, 2), keepdims=True)
        extent = np.maximum(voxels.max(axis=(1, 2), keepdims=True) - low, 1e-6)
        voxels = np.rint(255 * (voxels - low) / extent).astype(np.uint8)
    depth, height, width = geometry.spacing_mm
    return Volume(np.ascontiguousarray(voxels.transpose(2, 1, 0)), np.diag([width, height, depth, 1.0]))


def _resized(array: np.ndarray, shape: Sequence[int], filter: Filter) -> np.ndarray:
    """float32 of another shape that covers the same field of view."""
    array = array.astype(np.float32)
    for axis, (old, new) in enumerate(zip(array.shape, shape, strict=True)):
        if old != new:
            low, high, weights = axis_weights(old, new, 0, new, filter)
            taken = array.take(range(low, high), axis)
            array = np.moveaxis(np.tensordot(weights.numpy(), taken, (1, axis)), 0, axis)
    return array


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
    clicks: _Clicks, place: np.ndarray, crop: Crop, inside: np.ndarray, walls: Crop | None, view: float
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
        other_crop, other = clicks(moved, half_mm, walls, view)
        found = _numbers(other, other_crop, shape)
        scores.append(2 * len(np.intersect1d(own, found, assume_unique=True)) / (len(own) + len(found)))
    return float(np.mean(scores))


def _numbers(inside: np.ndarray, crop: Crop, shape: tuple[int, int, int]) -> np.ndarray:
    """Flat index on the oriented grid of every voxel of a mask in a crop."""
    voxels = np.argwhere(inside) + [side.start for side in crop]
    numbers: np.ndarray = np.ravel_multi_index(tuple(voxels.T), shape)
    return numbers


def _square(centre: int, size: int, side: int) -> slice:
    """The pixels round the centre, moved to lie in the scan; all of it where the scan is smaller."""
    length = min(side, size)
    start = min(max(0, centre - length // 2), size - length)
    return slice(start, start + length)


def _within(walls: Crop, crop: Crop) -> np.ndarray:
    inside = np.ones(tuple(side.stop - side.start for side in crop), bool)
    for axis, (wall, side) in enumerate(zip(walls, crop, strict=True)):
        index = np.arange(side.start, side.stop)
        keep = (index >= wall.start) & (index < wall.stop)
        inside &= keep.reshape([-1 if other == axis else 1 for other in range(3)])
    return inside


def _why_nothing(clicks: _Clicks, place: np.ndarray) -> str:
    reach = [int(_BALL_MM // step) for step in clicks.geometry.spacing_mm]
    ball = clicks.slices[
        tuple(slice(max(0, at - r), at + r + 1) for at, r in zip(place.tolist(), reach, strict=True))
    ]
    mean = float(ball.mean(dtype=np.float64))
    where = ""
    if clicks.lowest < _HU_BELOW:
        places = ((-950, "air"), (-600, "lung"), (-150, ""), (150, "soft tissue"), (math.inf, ""))
        tissue = next(name for most, name in places if mean < most)
        where = f": it lies in {tissue}" if tissue else ""
    return f"no nodule within {REACH_MM:g} mm of the point{where} (mean {mean:.0f} within {_BALL_MM:g} mm)"
