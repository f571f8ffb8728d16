"""Tumours of six kinds, and the harmless findings that look a little like them.

Attenuation: solid parts 20 to 60 HU, up to 125 with contrast medium; ground glass -640 to -430 HU, through
which vessels stay visible (Hansell et al. 2008, "Fleischner Society: glossary of terms for thoracic imaging",
Radiology 246:697; MacMahon et al. 2017, Radiology 284:228). Granulomas calcify above 200 HU (Zerhouni et al.
1986, Radiology 160:319).
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lungkit.data.phantom.grid import Box, Grid, add_capsules, coverage, paint, paint_ellipsoid, smooth_noise
from lungkit.data.phantom.vessels import Tubes


class TumourKind(str, enum.Enum):
    """How a tumour looks and what it touches."""

    SOLID = "solid"
    PART_SOLID = "part-solid"
    GROUND_GLASS = "ground-glass"
    SPICULATED = "spiculated"
    WALL_ATTACHED = "wall-attached"
    VESSEL_ATTACHED = "vessel-attached"


@dataclasses.dataclass(frozen=True)
class Tumour:
    """A tumour of a phantom: ``centre`` is a voxel (z, y, x), ``diameter_mm`` that of a ball of its size."""

    kind: TumourKind
    centre: tuple[int, int, int]
    diameter_mm: float


@dataclasses.dataclass(frozen=True)
class TumourShape:
    """Everything that is drawn about one tumour, so that it can be rasterised at any size."""

    kind: TumourKind
    centre_mm: np.ndarray
    radius_mm: float
    stretch: np.ndarray
    """(3, 3) map that makes the ball an ellipsoid; determinant about 1."""
    lobes: np.ndarray
    """(n, 4): direction and height of bumps and dents."""
    spicules: np.ndarray
    """(n, 4): direction and length in radii."""
    core: float
    """Radius of the solid part in radii of the whole; 0 in pure ground glass, 1 in solid tumours."""
    solid_hu: float
    glass_hu: float
    texture_seed: int


class Scene(NamedTuple):
    """The chest that tumours are placed in; ``lungs`` (Z, Y, X) is the signed distance to aerated lung."""

    grid: Grid
    lungs: np.ndarray
    vessels: Tubes
    blood_hu: float


def draw_tumour(
    kind: TumourKind,
    radius_mm: float,
    scene: Scene,
    taken: Sequence[TumourShape],
    random: np.random.Generator,
) -> TumourShape:
    """Draw a tumour of one kind and a place for it, clear of those ``taken``."""
    centre = _place(kind, radius_mm, scene, taken, random)
    lobes = np.concatenate([_directions(random, 7), random.uniform(-0.22, 0.28, (7, 1))], axis=1)
    spicules = np.zeros((0, 4))
    if kind is TumourKind.SPICULATED:
        count = int(random.integers(16, 28))
        rays = _directions(random, count)
        # Rays near the axial plane show in it; a single slice would meet hardly any of the others.
        rays[:, 0] *= 0.05 if scene.grid.shape[0] == 1 else 0.5
        spicules = np.concatenate([_unit(rays), random.uniform(1.6, 2.7, (count, 1))], axis=1)
    return TumourShape(
        kind=kind,
        centre_mm=centre,
        radius_mm=radius_mm,
        stretch=_stretch(random),
        lobes=lobes,
        spicules=spicules,
        core={TumourKind.GROUND_GLASS: 0.0, TumourKind.PART_SOLID: float(random.uniform(0.4, 0.65))}.get(
            kind, 1.0
        ),
        # Contrast medium reaches tumours too, though less than vessels.
        solid_hu=float(random.uniform(20.0, 60.0)) + max(0.0, 0.45 * (scene.blood_hu - 50.0)),
        glass_hu=float(random.uniform(-640.0, -430.0)),
        texture_seed=int(random.integers(2**31)),
    )


def rasterise(shape: TumourShape, scene: Scene) -> tuple[Box, np.ndarray, np.ndarray]:
    """The box around a tumour and, on it, the coverage of its solid part and of the whole."""
    grid, radius = scene.grid, shape.radius_mm
    reach = radius * (2.7 if len(shape.spicules) else 1.5) + grid.softness_mm
    box = grid.box(shape.centre_mm - reach, shape.centre_mm + reach)
    if box is None:
        raise ValueError(f"a tumour at {shape.centre_mm} lies outside the field of view")
    z, y, x = grid.local(box, shape.centre_mm)
    distance_to_centre = np.sqrt(z * z + y * y + x * x) + 1e-6
    stretched = [row[0] * z + row[1] * y + row[2] * x for row in shape.stretch.tolist()]
    length = np.sqrt(stretched[0] ** 2 + stretched[1] ** 2 + stretched[2] ** 2)
    bumps = np.zeros_like(length)
    for dz, dy, dx, height in shape.lobes.tolist():
        cosine = (dz * z + dy * y + dx * x) / distance_to_centre
        bumps += height * np.exp(4.0 * (cosine - 1.0))
    # A rough surface: bumps of a third of the radius, deeper in ground glass, whose border is never sharp.
    rough = smooth_noise(np.random.default_rng(shape.texture_seed + 1), grid, max(3.0, radius / 2.5), box)
    surface = radius * (1.0 + bumps + (0.05 if shape.core == 1.0 else 0.10) * rough)
    softness = grid.softness_mm
    whole = coverage(length - surface, softness if shape.core == 1.0 else max(softness, 2.5))
    solid = coverage(length - shape.core * surface, softness) if shape.core > 0 else np.zeros_like(whole)
    for dz, dy, dx, reach_in_radii in shape.spicules.tolist():
        along = dz * z + dy * y + dx * x
        aside = np.sqrt(np.maximum(distance_to_centre**2 - along**2, 0.0))
        width = (0.12 * radius + 0.7) * (1.0 - along / (reach_in_radii * radius))
        ray = coverage(aside - width, softness) * np.clip(2.0 * width / softness, 0.0, 1.0) * (along > 0)
        solid = np.maximum(solid, ray)
    whole = np.maximum(whole, solid)
    pleura = coverage(scene.lungs[box], softness)
    return box, solid * pleura, whole * pleura


def paint_tumour(
    image: np.ndarray, grid: Grid, shape: TumourShape, box: Box, solid: np.ndarray, whole: np.ndarray
) -> None:
    """Ground glass adds to the lung and leaves vessels visible; solid tissue replaces what was there."""
    random = np.random.default_rng(shape.texture_seed)
    part = image[box]
    if shape.core < 1.0:
        glass = part.copy()
        paint(glass, whole, shape.glass_hu + 35.0 * smooth_noise(random, grid, 5.0, box))
        np.maximum(part, glass, out=part)
    paint(part, solid, shape.solid_hu + 8.0 * smooth_noise(random, grid, 6.0, box))


def paint_distractors(image: np.ndarray, grid: Grid, lungs: np.ndarray, random: np.random.Generator) -> None:
    """Calcified granulomas and scars: bright or dense, but no tumours."""
    inside = np.argwhere(lungs < -3.0)
    if not len(inside):
        return
    pleura = coverage(lungs, grid.softness_mm)
    per_depth = max(1.0, grid.shape[0] * grid.spacing_mm[0] / 80.0)
    for _ in range(int(random.poisson(0.7 * per_depth))):
        centre = grid.points(inside[random.integers(len(inside))])
        semi_axes = random.uniform(1.6, 3.2) * random.uniform(0.85, 1.15, 3)
        paint_ellipsoid(image, grid, centre, semi_axes, float(random.uniform(250, 800)))
    near_pleura = np.argwhere((lungs < -1.0) & (lungs > -8.0))
    for _ in range(int(random.poisson(0.8 * per_depth)) if len(near_pleura) else 0):
        start = grid.points(near_pleura[random.integers(len(near_pleura))])
        direction = _unit(random.normal(0, 1, 3) * [0.25, 1.0, 1.0])
        bend = _unit(direction + random.normal(0, 0.35, 3) * [0.25, 1.0, 1.0])
        half = float(random.uniform(8.0, 20.0))
        points = np.stack([start, start + half * direction, start + half * (direction + bend)])
        covered = np.zeros(grid.shape, np.float32)
        add_capsules(covered, grid, points[:-1], points[1:], np.full(2, float(random.uniform(0.9, 1.8))))
        paint(image, covered * pleura, float(random.uniform(-200.0, 30.0)))


def _place(
    kind: TumourKind,
    radius: float,
    scene: Scene,
    taken: Sequence[TumourShape],
    random: np.random.Generator,
) -> np.ndarray:
    """The best of many random places: wholly in the lung, half in the wall, or on a vessel."""
    grid, lungs = scene.grid, scene.lungs
    inside = np.argwhere(lungs < 0.0)
    candidates = grid.points(inside[random.integers(len(inside), size=160)])
    if kind is TumourKind.VESSEL_ATTACHED:
        beside = _beside_vessels(radius, grid, scene.vessels, random)
        candidates = beside if len(beside) else candidates
    flat = grid.shape[0] == 1
    angles = np.arange(24) * (math.pi * (3.0 - math.sqrt(5.0)))
    heights = np.zeros(24) if flat else np.linspace(-0.96, 0.96, 24)
    ring = np.sqrt(1.0 - heights**2)
    probes = np.stack([heights, ring * np.sin(angles), ring * np.cos(angles)], axis=1) * radius
    voxels, within = grid.nearest(
        candidates[:, None] + np.concatenate([probes, 0.5 * probes, [[0.0, 0.0, 0.0]]])
    )
    share = ((lungs[tuple(np.moveaxis(voxels, -1, 0))] < 0) & within).mean(axis=1)
    score = -np.abs(share - 0.72) if kind is TumourKind.WALL_ATTACHED else np.minimum(share, 0.95)
    for other in taken:
        gap = np.sqrt(((candidates - other.centre_mm) ** 2).sum(axis=1))
        score = score - (gap < 1.3 * (radius + other.radius_mm))
    return candidates[int(np.argmax(score))]


def _beside_vessels(radius: float, grid: Grid, vessels: Tubes, random: np.random.Generator) -> np.ndarray:
    """Places on whose surface a vessel of some width runs."""
    middles = (vessels.starts + vessels.ends) / 2
    if grid.shape[0] == 1:  # where the vessel crosses the slice
        rise = vessels.ends[:, 0] - vessels.starts[:, 0]
        t = (grid.origin_mm[0] - vessels.starts[:, 0]) / np.where(np.abs(rise) < 1e-3, 1e-3, rise)
        middles = vessels.starts + np.clip(t, 0.0, 1.0)[:, None] * (vessels.ends - vessels.starts)
    _, within = grid.nearest(middles)
    thick = np.flatnonzero(within & (vessels.radii > 1.1))
    if not len(thick):
        return np.zeros((0, 3))
    chosen = thick[random.integers(len(thick), size=160)]
    aside = _directions(random, 160)
    if grid.shape[0] == 1:
        aside[:, 0] = 0.0
    return middles[chosen] + _unit(aside) * (0.85 * radius + vessels.radii[chosen, None])


def _stretch(random: np.random.Generator) -> np.ndarray:
    """Random axes and lengths of an ellipsoid, as a map that makes it a ball."""
    first, other = _directions(random, 2)
    second = _unit(other - (other * first).sum() * first)
    axes = np.stack([first, second, np.cross(first, second)])
    factors = np.exp(random.uniform(-0.22, 0.22, 3))
    factors /= np.cbrt(factors.prod())
    return sum(factor * np.multiply.outer(axis, axis) for factor, axis in zip(factors, axes, strict=True))


def _directions(random: np.random.Generator, count: int) -> np.ndarray:
    return _unit(random.normal(0, 1, (count, 3)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True)), 1e-9)
