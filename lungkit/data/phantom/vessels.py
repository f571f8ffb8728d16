"""Branching vessels and airways of the lungs, and the great vessels between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lungkit.data.phantom.grid import Grid, add_capsules, paint
from lungkit.data.phantom.patient import Patient

_HILUM = np.array([6.0, 5.0, 44.0])
# First branches of one lung from its hilum, towards (z, y, x): upper front, upper back, middle, lower back,
# lower front, lower middle.
_ROOTS = np.array(
    [
        [0.9, -0.4, 0.5],
        [0.8, 0.5, 0.6],
        [0.05, -0.8, 0.7],
        [-0.7, 0.7, 0.4],
        [-0.8, -0.2, 0.7],
        [-0.1, 0.3, 1.0],
    ]
)
_MAX_GENERATION = 20


class Tubes(NamedTuple):
    """n straight pieces of tube: ``starts`` and ``ends`` (n, 3) in mm, ``radii`` and ``generations`` (n,)."""

    starts: np.ndarray
    ends: np.ndarray
    radii: np.ndarray
    generations: np.ndarray


def grow_vessels(patient: Patient, random: np.random.Generator, *, min_radius_mm: float) -> Tubes:
    """Arteries and veins of both lungs, from the hila out to ``min_radius_mm``.

    A vessel of radius r runs about 6 r and parts in two with r^3 = r1^3 + r2^3 (Murray 1926, "The
    physiological principle of minimum work", PNAS 12:207), unequally, the wider branch bending less.
    Branches that would leave the lung are turned, or end.
    """
    count = len(_ROOTS)
    sides = np.repeat([-1.0, 1.0], 2 * count)
    directions = np.tile(_ROOTS, (4, 1)) + random.normal(0, 0.15, (4 * count, 3))
    directions[:, 2] *= sides
    starts = _HILUM + random.normal(0, 4.0, (4 * count, 3))
    starts[:, 2] *= sides
    hila = _HILUM * np.stack([np.ones_like(sides), np.ones_like(sides), sides], axis=1)
    radii = random.uniform(3.2, 5.0, 4 * count)
    parts: list[Tubes] = []
    for generation in range(_MAX_GENERATION):
        lengths = radii * random.uniform(4.5, 7.5, len(radii)) + 1.5
        outwards = _unit(starts - hila)
        tries = (
            directions[:, None]
            + 0.3 * outwards[:, None]
            + random.normal(0, 1, (len(radii), 5, 3)) * _TRY_JITTER
        )
        ends = starts[:, None] + _unit(tries) * lengths[:, None, None]
        inside = patient.lungs(ends[..., 0], ends[..., 1], ends[..., 2]) < -(radii[:, None] + 1.0)
        kept = inside.any(axis=1)
        ends = ends[np.arange(len(radii)), inside.argmax(axis=1)]
        starts, ends, radii, hila = starts[kept], ends[kept], radii[kept], hila[kept]
        parts.append(Tubes(starts, ends, radii, np.full(len(radii), generation)))
        share = random.uniform(0.15, 0.5, len(radii))
        forward = _unit(ends - starts)
        sideways = _unit(np.cross(forward, random.normal(0, 1, (len(radii), 3))))
        bend = np.deg2rad(random.uniform([[4], [30]], [[20], [60]], (2, len(radii))))
        directions = np.concatenate(
            [
                forward * np.cos(bend[0])[:, None] + sideways * np.sin(bend[0])[:, None],
                forward * np.cos(bend[1])[:, None] - sideways * np.sin(bend[1])[:, None],
            ]
        )
        radii = np.concatenate([radii * np.cbrt(1 - share), radii * np.cbrt(share)])
        starts, hila = np.concatenate([ends, ends]), np.concatenate([hila, hila])
        alive = radii >= min_radius_mm
        starts, directions, radii, hila = starts[alive], directions[alive], radii[alive], hila[alive]
        if not len(radii):
            break
    return Tubes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


# Spread of the five directions tried for a branch, from nearly straight on to anywhere.
_TRY_JITTER = np.array([0.12, 0.3, 0.6, 1.0, 2.0])[None, :, None]


def paint_lung_vessels(
    image: np.ndarray, grid: Grid, patient: Patient, vessels: Tubes, inside_lungs: np.ndarray
) -> None:
    """Vessels, then airways with wall and lumen beside every other artery of the first generations."""
    covered = np.zeros(grid.shape, np.float32)
    add_capsules(covered, grid, vessels.starts, vessels.ends, vessels.radii)
    covered *= inside_lungs
    paint(image, covered, patient.blood)
    accompanied = (vessels.generations < 5) & (vessels.radii > 1.8)
    accompanied[1::2] = False
    bore = 0.75 * vessels.radii[accompanied]
    wall = np.maximum(0.25 * bore, 0.7)
    beside = (vessels.radii[accompanied] + bore + wall)[:, None] * np.array([0.0, 0.8, 0.6])
    ends = vessels.starts[accompanied] + beside, vessels.ends[accompanied] + beside
    for radii, value in ((bore + wall, patient.soft_tissue - 30.0), (bore, -980.0)):
        covered = np.zeros(grid.shape, np.float32)
        add_capsules(covered, grid, *ends, radii)
        covered *= inside_lungs
        paint(image, covered, value)


def paint_great_vessels(image: np.ndarray, grid: Grid, patient: Patient) -> None:
    """Aorta, caval vein, pulmonary trunk and its branches, oesophagus, trachea and main bronchi."""
    blood, softness = patient.blood, grid.softness_mm
    for path, radius, value in (
        (
            [(-40, -32, -8), (45, -30, -12), (66, -14, -4), (70, 8, 12), (58, 28, 23), (40, 38, 25)],
            14.5,
            blood,
        ),
        ([(40, 38, 25), (-140, 42, 22)], 12.0, blood),
        ([(110, -20, -24), (-20, -18, -27)], 8.5, blood),
        ([(66, -14, -8), (140, -16, -16)], 6.0, blood),
        ([(68, -4, 6), (140, -4, 12)], 4.5, blood),
        ([(68, 12, 16), (140, 14, 24)], 4.5, blood),
        ([(-30, -48, 12), (16, -28, 15)], 13.5, blood),
        ([(16, -26, 14), (8, -4, -40)], 9.5, blood),
        ([(18, -22, 16), (14, 6, 42)], 9.5, blood),
        ([(140, 24, 4), (-140, 30, 6)], 6.5, 30.0),
        ([(140, 3, 0), (34, 9, 0)], 10.0, 35.0),
        ([(34, 9, 0), (4, 6, -44)], 7.5, 35.0),
        ([(34, 9, 0), (2, 9, 46)], 7.0, 35.0),
        ([(140, 3, 0), (34, 9, 0)], 8.3, -1000.0),
        ([(34, 9, 0), (4, 6, -44)], 6.0, -1000.0),
        ([(34, 9, 0), (2, 9, 46)], 5.5, -1000.0),
    ):
        points = np.array(path, dtype=np.float64)
        low, high = points.min(axis=0) - radius - softness, points.max(axis=0) + radius + softness
        box = grid.box(low, high)
        if box is None:
            continue
        covered = np.zeros(grid.shape, np.float32)
        add_capsules(covered, grid, points[:-1], points[1:], np.full(len(points) - 1, radius))
        paint(image[box], covered[box], value)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True)), 1e-9)
