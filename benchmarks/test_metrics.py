"""Surface metrics (HD95 and NSD at 2 mm) of a tumour and of an organ: lungkit, MONAI, surface-distance and edt.

The pair is 96 x 192 x 192 voxels of 2.5 x 0.8 x 0.8 mm. MONAI's and edt's numbers are held equal to ours; those of
surface-distance belong to another definition (surface elements weighted by their area) and are timed alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lungkit.metrics import hausdorff_mm, surface_dice, surface_distances
from lungkit.metrics._surface_numpy import _boundary, _box

SHAPE = (96, 192, 192)
SPACING_MM = (2.5, 0.8, 0.8)
TOLERANCE_MM = 2.0
VOXELS = {"tumour": 27_000, "organ": 930_000}

Pair = tuple[np.ndarray, np.ndarray]


def lumpy_ball(voxels: int, *, seed: int, shift: tuple[int, int, int]) -> np.ndarray:
    """A ball of about ``voxels`` voxels with an uneven surface."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed (extra 'test')")
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), (2, 6, 6))
    axes = [
        (np.arange(size) - size // 2 - offset) * spacing
        for size, offset, spacing in zip(SHAPE, shift, SPACING_MM, strict=True)
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    radius = (voxels * np.prod(SPACING_MM) * 3 / (4 * np.pi)) ** (1 / 3)
    return np.sqrt(z**2 + y**2 + x**2) + noise / noise.std() * radius * 0.08 < radius


@pytest.fixture(scope="module", params=VOXELS)
def pair(request: pytest.FixtureRequest) -> Pair:
    voxels = VOXELS[request.param]
    return lumpy_ball(voxels, seed=1, shift=(0, 0, 0)), lumpy_ball(voxels, seed=2, shift=(1, 2, -2))


def ours(pair: Pair, threads: int) -> tuple[float, float]:
    distances = surface_distances(*pair, SPACING_MM, threads=threads)
    return hausdorff_mm(distances), surface_dice(distances, TOLERANCE_MM)


def monais(pair: Pair) -> tuple[float, float]:
    metrics = pytest.importorskip("monai.metrics", reason="MONAI is not installed (extra 'test')")
    first, second = (torch.from_numpy(mask)[None, None] for mask in pair)
    hausdorff = metrics.compute_hausdorff_distance(
        first, second, include_background=True, percentile=95, spacing=SPACING_MM
    )
    nsd = metrics.compute_surface_dice(
        first, second, [TOLERANCE_MM], include_background=True, spacing=SPACING_MM
    )
    return float(hausdorff), float(nsd)


def edts(pair: Pair) -> tuple[float, float]:
    """The same definitions with edt's distance transform inside the joint box."""
    edt = pytest.importorskip("edt", reason="edt is not installed")
    first, second = (_boundary(mask) for mask in pair)
    box = _box(first | second)
    first, second = first[box], second[box]
    sets = [
        edt.edt(~target, anisotropy=SPACING_MM, parallel=2)[origin]
        for origin, target in ((first, second), (second, first))
    ]
    within = sum((values <= TOLERANCE_MM).sum() for values in sets)
    return max(float(np.percentile(values, 95)) for values in sets), float(within / sum(map(len, sets)))


def deepminds(pair: Pair) -> tuple[float, float]:
    metrics = pytest.importorskip(
        "surface_distance.metrics", reason="surface-distance is not installed (extra 'test')"
    )
    distances = metrics.compute_surface_distances(pair[1], pair[0], SPACING_MM)
    return (
        metrics.compute_robust_hausdorff(distances, 95),
        metrics.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM),
    )


@pytest.mark.parametrize(
    ("measure", "same_definition"),
    [
        pytest.param(lambda pair: ours(pair, 1), True, id="lungkit, 1 thread"),
        pytest.param(lambda pair: ours(pair, 2), True, id="lungkit, 2 threads"),
        pytest.param(monais, True, id="MONAI"),
        pytest.param(edts, True, id="edt"),
        pytest.param(deepminds, False, id="surface-distance"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_hd95_and_nsd(
    benchmark: Callable[..., tuple[float, float]],
    pair: Pair,
    measure: Callable[[Pair], tuple[float, float]],
    same_definition: bool,
) -> None:
    found = benchmark(measure, pair)
    if same_definition:
        assert found == pytest.approx(ours(pair, 1), abs=1e-4)
