"""Ways to compute HD95 and NSD at 2 mm of two masks.

MONAI's and edt's numbers are ours; those of surface-distance belong to another definition (surface elements weighted by
their area). MONAI and surface-distance use one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from harness import OURS, Case, Provider

from lungkit.metrics import hausdorff_mm, surface_dice, surface_distances
from lungkit.metrics._surface_numpy import _boundary, _box

SPACING_MM = (2.5, 0.8, 0.8)
TOLERANCE_MM = 2.0

Pair = tuple[np.ndarray, np.ndarray]
Measure = Callable[[Pair], tuple[float, float]]


def lumpy_ball(
    shape: tuple[int, int, int], voxels: int, *, seed: int, shift: tuple[int, int, int]
) -> np.ndarray:
    """A ball of about ``voxels`` voxels with an uneven surface."""
    from scipy import ndimage

    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), (2, 6, 6))
    axes = [
        (np.arange(size) - size // 2 - offset) * spacing
        for size, offset, spacing in zip(shape, shift, SPACING_MM, strict=True)
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    radius = (voxels * np.prod(SPACING_MM) * 3 / (4 * np.pi)) ** (1 / 3)
    return np.sqrt(z**2 + y**2 + x**2) + noise / noise.std() * radius * 0.08 < radius


def _ours(threads: int) -> Measure:
    def measure(pair: Pair) -> tuple[float, float]:
        distances = surface_distances(*pair, SPACING_MM, threads=threads)
        return hausdorff_mm(distances), surface_dice(distances, TOLERANCE_MM)

    return measure


def _monai(threads: int) -> Measure:
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    def measure(pair: Pair) -> tuple[float, float]:
        first, second = (torch.from_numpy(mask)[None, None] for mask in pair)
        options = {"include_background": True, "spacing": SPACING_MM}
        hausdorff = compute_hausdorff_distance(first, second, percentile=95, **options)
        return float(hausdorff), float(compute_surface_dice(first, second, [TOLERANCE_MM], **options))

    return measure


def _edt(threads: int) -> Measure:
    """The same definitions with edt's distance transform inside the joint box."""
    import edt

    def measure(pair: Pair) -> tuple[float, float]:
        first, second = (_boundary(mask) for mask in pair)
        box = _box(first | second)
        first, second = first[box], second[box]
        sets = [
            edt.edt(~target, anisotropy=SPACING_MM, parallel=threads)[origin]
            for origin, target in ((first, second), (second, first))
        ]
        within = sum((values <= TOLERANCE_MM).sum() for values in sets)
        return max(float(np.percentile(values, 95)) for values in sets), float(within / sum(map(len, sets)))

    return measure


def _surface_distance(threads: int) -> Measure:
    from surface_distance import metrics

    def measure(pair: Pair) -> tuple[float, float]:
        distances = metrics.compute_surface_distances(pair[1], pair[0], SPACING_MM)
        return (
            metrics.compute_robust_hausdorff(distances, 95),
            metrics.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM),
        )

    return measure


MEASURES: dict[str, Callable[[int], Measure]] = {
    OURS: _ours,
    "MONAI": _monai,
    "edt": _edt,
    "surface-distance": _surface_distance,
}


@dataclass(frozen=True)
class SurfaceCase(Case):
    """A pair of shifted masks, each of about ``voxels`` voxels, in a scan of ``shape`` voxels (Z, Y, X)."""

    name: str
    voxels: int
    shape: tuple[int, int, int] = (96, 192, 192)

    op = "hd95_and_nsd"
    modes = ("forward",)

    @property
    def label(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.name} of {self.voxels} voxels"

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(MEASURES)

    def inputs(self) -> Pair:
        return (
            lumpy_ball(self.shape, self.voxels, seed=1, shift=(0, 0, 0)),
            lumpy_ball(self.shape, self.voxels, seed=2, shift=(1, 2, -2)),
        )

    def build(self, provider: str, inputs: Pair) -> Provider:
        measure = MEASURES[provider](self.threads)
        return Provider(lambda: measure(inputs))
