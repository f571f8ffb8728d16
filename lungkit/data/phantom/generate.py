"""From a seed to a chest CT with tumours and their mask."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import numpy as np

from lungkit.data.phantom.grid import Grid
from lungkit.data.phantom.patient import Patient
from lungkit.data.phantom.scanner import scan
from lungkit.data.phantom.thorax import render_thorax
from lungkit.data.phantom.tumours import (
    Scene,
    Tumour,
    TumourKind,
    TumourShape,
    draw_tumour,
    paint_distractors,
    paint_tumour,
    rasterise,
)
from lungkit.data.phantom.vessels import grow_vessels
from lungkit.errors import UsageError

FIELD_OF_VIEW_MM = 340.0
TUMOUR_FRACTION = (0.0005, 0.03)
"""Smallest and largest share of the voxels that the tumours of a phantom fill together."""
_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Phantom:
    """A synthetic chest CT.

    Arrays are (Z, Y, X): z towards the head, y towards the back, x towards the patient's left, so that a
    slice drawn with its first row on top looks as radiologists are used to.
    """

    image: np.ndarray
    """int16, HU"""
    label: np.ndarray
    """uint8, 1 in tumours"""
    lungs: np.ndarray
    """uint8, 1 inside the pleura: air, vessels and tumours"""
    heart: np.ndarray
    """uint8, 1 in the heart"""
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    """zyx position of the first voxel"""
    tumours: tuple[Tumour, ...]

    @property
    def affine(self) -> np.ndarray:
        """4 x 4, from voxel (x, y, z) to mm in NIfTI's axes (right, anterior, superior positive)."""
        (sz, sy, sx), (oz, oy, ox) = self.spacing_mm, self.origin_mm
        affine = np.diag([-sx, -sy, sz, 1.0])
        affine[:3, 3] = -ox, -oy, oz
        return affine


def make_phantom(
    seed: int,
    *,
    shape: Sequence[int] = (64, 128, 128),
    spacing_mm: Sequence[float] | None = None,
    kinds: Sequence[TumourKind | str] | None = None,
) -> Phantom:
    """Draw a patient, tumours and a scan from a seed: the same seed and shape always give the same bits.

    The chest has skin, fat, muscle, bones, heart and great vessels, lungs with branching vessels, airways and
    texture, granulomas and scars; see :mod:`lungkit.data.phantom.thorax` and
    :mod:`lungkit.data.phantom.tumours` for the attenuations and their sources. One to three tumours fill
    0.05 % to 3 % of the voxels, log-uniformly. Neither a threshold nor a fixed place finds them, as heart,
    muscle and vessels share their attenuation. It is a tool for tests and demonstrations: a model trained on
    it knows nothing of real lungs.

    Args:
        seed: non-negative integer.
        shape: (Z, Y, X), at least (1, 32, 32); Z = 1 gives one axial slice.
        spacing_mm: voxel size (z, y, x). By default the whole chest fits in plane (340 mm) and, from 48
            slices on, in height (240 mm); slices are at most 5 mm apart. A smaller field of view shows a
            random part of a lung.
        kinds: the kinds of the tumours, in any number, none with ``()``; drawn at random by default.

    Raises:
        UsageError: an argument is out of range, or no tumour fits in the field of view.

    Example:
        >>> phantom = make_phantom(3, shape=(1, 64, 64))
        >>> phantom.image.shape, phantom.image.dtype.name, [round(s, 2) for s in phantom.spacing_mm]
        ((1, 64, 64), 'int16', [5.0, 5.31, 5.31])
        >>> bool(np.array_equal(phantom.label, make_phantom(3, shape=(1, 64, 64)).label))
        True
        >>> 0.0005 <= float(phantom.label.mean()) <= 0.03
        True
    """
    if operator.index(seed) < 0:
        raise UsageError(f"seed is {seed}; give a non-negative integer")
    size, spacing = _checked_grid(shape, spacing_mm)
    wanted = None if kinds is None else _checked_kinds(kinds)
    # A stream of its own for each part: the patient stays the same whatever tumours are asked for.
    for_patient, for_view, for_vessels, for_tissue, for_tumours, for_scan = (
        np.random.default_rng((seed, part)) for part in range(6)
    )
    patient = Patient.draw(for_patient)
    grid = _field_of_view(size, spacing, patient, for_view)
    vessels = grow_vessels(patient, for_vessels, min_radius_mm=max(0.5, 0.28 * grid.softness_mm))
    image, pleura, aerated = render_thorax(grid, patient, vessels, for_tissue)
    paint_distractors(image, grid, aerated, for_tissue)

    scene = Scene(grid, aerated, vessels, patient.blood)
    label = np.zeros(grid.shape, np.uint8)
    tumours = []
    for tumour in _draw_tumours(wanted, scene, for_tumours):
        box, solid, whole = rasterise(tumour, scene)
        paint_tumour(image, grid, tumour, box, solid, whole)
        label[box] |= whole >= 0.5
        z, y, x = grid.nearest(tumour.centre_mm)[0].tolist()
        tumours.append(Tumour(tumour.kind, (z, y, x), 2.0 * tumour.radius_mm))
    body = patient.body(grid.z, grid.y, grid.x)
    cage = patient.cage(grid.z, grid.y, grid.x)
    # As it is painted: 4 mm within its surface, and not where lung covers it.
    heart = (patient.heart(grid.z, grid.y, grid.x) < -4.0) & (cage < 0) & (pleura >= 0)
    return Phantom(
        image=scan(image, grid, body, for_scan),
        label=label,
        lungs=(pleura < 0).astype(np.uint8),
        heart=heart.astype(np.uint8),
        spacing_mm=grid.spacing_mm,
        origin_mm=grid.origin_mm,
        tumours=tuple(tumours),
    )


def _draw_tumours(
    kinds: Sequence[TumourKind] | None, scene: Scene, random: np.random.Generator
) -> list[TumourShape]:
    """Tumours that fill the share of the voxels that was drawn, each of them visible."""
    if kinds is None:
        count = int(random.choice([1, 1, 1, 2, 2, 3]))
        kinds = [list(TumourKind)[i] for i in random.integers(len(TumourKind), size=count)]
    if not kinds:
        return []
    if (scene.lungs < 0).any():
        for _ in range(_ATTEMPTS):
            shapes = _fit_volume(_draw_shapes(kinds, scene, random), scene)
            if shapes:
                return shapes
    raise UsageError("no tumour fits in the lung that is in view; give a larger shape or spacing_mm")


def _draw_shapes(
    kinds: Sequence[TumourKind], scene: Scene, random: np.random.Generator
) -> tuple[list[TumourShape], float]:
    """Tumours of random shape and place, and the share of the voxels that they shall fill."""
    low, high = TUMOUR_FRACTION
    grid, flat = scene.grid, scene.grid.shape[0] == 1
    # In a whole chest 1 % is a tumour of 7 cm: volumes take the lower part of the range.
    target = float(np.exp(random.uniform(np.log(2.0 * low), np.log(high * (0.6 if flat else 0.25)))))
    shares = random.uniform(0.4, 1.0, len(kinds))
    volumes = target * shares / shares.sum() * float(np.prod(grid.shape) * np.prod(grid.spacing_mm))
    shapes: list[TumourShape] = []
    for kind, volume in zip(kinds, volumes, strict=True):
        # The radius of a disc of one slice, or of a ball.
        radius = np.sqrt(volume / grid.spacing_mm[0] / np.pi) if flat else np.cbrt(volume * 0.75 / np.pi)
        shapes.append(draw_tumour(kind, float(radius), scene, shapes, random))
    return shapes, target


def _fit_volume(drawn: tuple[list[TumourShape], float], scene: Scene) -> list[TumourShape] | None:
    """The tumours, all scaled alike until they fill their share; None where that cannot be had."""
    shapes, target = drawn
    low, high = TUMOUR_FRACTION
    power = 2.0 if scene.grid.shape[0] == 1 else 3.0
    for _ in range(_ATTEMPTS):
        filled = np.zeros(scene.grid.shape, bool)
        seen = 0
        for shape in shapes:
            box, _, whole = rasterise(shape, scene)
            filled[box] |= whole >= 0.5
            seen += bool((whole >= 0.5).any())
        fraction = float(filled.mean())
        if seen == len(shapes) and low <= fraction <= high and abs(fraction / target - 1.0) < 0.5:
            return shapes
        factor = float(np.clip((target / max(fraction, 1e-9)) ** (1.0 / power), 0.7, 1.5))
        shapes = [dataclasses.replace(shape, radius_mm=shape.radius_mm * factor) for shape in shapes]
    return None


def _field_of_view(
    size: tuple[int, int, int],
    spacing: tuple[float, float, float],
    patient: Patient,
    random: np.random.Generator,
) -> Grid:
    """The chest where all of it fits, else a window about a random point of a lung."""
    half = size[0] * spacing[0] / 2
    z = float(random.uniform(min(10.0, -62.0 + 0.7 * half), max(10.0, 75.0 - 0.7 * half)))
    points = random.uniform([z, -75.0, -110.0], [z, 75.0, 110.0], (400, 3))
    shift = random.uniform(-6.0, 6.0, 2)
    in_lung = points[patient.lungs(points[:, 0], points[:, 1], points[:, 2]) < -12.0]
    centre = [z, 8.0 + float(shift[0]), float(shift[1])]
    for axis, chest in ((1, 220.0), (2, 290.0)):
        if size[axis] * spacing[axis] < chest and len(in_lung):
            centre[axis] = float(in_lung[0, axis])
    return Grid(size, spacing, centre)


def _checked_grid(
    shape: Sequence[int], spacing_mm: Sequence[float] | None
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    size = tuple(operator.index(length) for length in shape)
    if len(size) != 3 or size[0] < 1 or min(size[1:]) < 32:
        raise UsageError(f"shape is {tuple(shape)}; give (Z, Y, X) of at least (1, 32, 32)")
    if spacing_mm is None:
        in_plane = FIELD_OF_VIEW_MM / min(size[1:])
        return (size[0], size[1], size[2]), (min(max(240.0 / size[0], 1.0), 5.0), in_plane, in_plane)
    spacing = tuple(float(length) for length in spacing_mm)
    if len(spacing) != 3 or not all(0.05 <= length <= 50.0 for length in spacing):
        raise UsageError(f"spacing_mm is {tuple(spacing_mm)}; give (z, y, x) from 0.05 to 50 mm")
    return (size[0], size[1], size[2]), (spacing[0], spacing[1], spacing[2])


def _checked_kinds(kinds: Sequence[TumourKind | str]) -> list[TumourKind]:
    try:
        return [TumourKind(kind) for kind in kinds]
    except ValueError:
        known = ", ".join(kind.value for kind in TumourKind)
        raise UsageError(f"kinds is {list(kinds)}; each is one of {known}") from None
