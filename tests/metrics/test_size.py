"""Volume in ml and the longest in-plane diameter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lungkit.errors import UsageError
from lungkit.metrics import axial_diameters_mm, longest_diameter_mm, volume_ml


def test_volume_is_voxels_times_spacing() -> None:
    mask = torch.zeros(4, 8, 8)
    mask[1:3, :5, :5] = 2
    assert volume_ml(mask, (2.0, 0.5, 0.5)) == pytest.approx(50 * 0.5 / 1000)


def test_single_voxel_is_as_long_as_its_wider_side() -> None:
    mask = np.zeros((3, 5, 5))
    mask[1, 2, 2] = 1
    assert longest_diameter_mm(mask, (5.0, 0.7, 0.9)) == pytest.approx(0.9)


def test_diagonal_of_a_square() -> None:
    mask = np.zeros((10, 10))
    mask[2:6, 3:7] = 1
    # From the middle of an outer face of one corner voxel to that of the opposite one: 4 by 3 voxels.
    assert longest_diameter_mm(mask, (1.0, 1.0)) == pytest.approx(5.0)


@pytest.mark.parametrize("seed", range(5))
def test_longest_is_that_of_all_pairs(seed: int) -> None:
    mask = np.random.default_rng(seed).random((9, 11)) < 0.5
    spacing = (0.7, 1.3)
    from scipy import ndimage

    lesions, count = ndimage.label(mask, np.ones((3, 3)))
    longest = 0.0
    for lesion in range(1, count + 1):
        points = [
            ((y + dy) * spacing[0], (x + dx) * spacing[1])
            for y, x in np.argwhere(lesions == lesion)
            for dy, dx in ((-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5))
        ]
        longest = max(longest, *(math.dist(a, b) for a in points for b in points))
    assert longest_diameter_mm(mask, spacing) == pytest.approx(longest)


def test_slices_are_measured_one_by_one() -> None:
    mask = np.zeros((2, 4, 20))
    mask[0, 0, :5], mask[1, 0, 4:12] = 1, 1
    assert longest_diameter_mm(mask, (1.0, 1.0, 1.0)) == 8.0


def test_separate_lesions_are_not_measured_across() -> None:
    mask = np.zeros((1, 4, 20))
    mask[0, 0, 0], mask[0, 0, 19] = 1, 1
    assert longest_diameter_mm(mask, (1.0, 1.0, 1.0)) == 1.0


def test_disc_measures_about_its_diameter() -> None:
    y, x = np.mgrid[:80, :80]
    disc = (y - 40) ** 2 + (x - 40) ** 2 <= 30**2
    assert longest_diameter_mm(disc, (0.5, 0.5)) == pytest.approx(30.5, abs=0.1)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, 2.5])
def test_axes_of_an_ellipse_are_its_diameters_however_it_lies(angle: float) -> None:
    y, x = np.mgrid[-40:40, -40:40] + 0.5
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    mask = np.zeros((3, 80, 80))
    mask[1] = (along / 30) ** 2 + (across / 15) ** 2 <= 1
    mask[2] = (x**2 + y**2) <= 20**2  # rounder, but its long axis is the shorter one
    assert axial_diameters_mm(mask, (2.5, 1.0, 1.0)) == pytest.approx((60.0, 30.0), abs=1.0)


def test_axes_of_one_voxel_are_its_sides() -> None:
    mask = np.zeros((3, 5, 5))
    mask[1, 2, 2] = 1
    assert axial_diameters_mm(mask, (5.0, 0.7, 0.9)) == (0.9, 0.7)
    assert axial_diameters_mm(0 * mask, (5.0, 0.7, 0.9)) == (0.0, 0.0)


def test_empty_mask_is_zero() -> None:
    assert longest_diameter_mm(np.zeros((2, 3, 4)), (1, 1, 1)) == 0
    assert volume_ml(np.zeros((2, 3, 4)), (1, 1, 1)) == 0


def test_spacing_of_another_length_is_refused() -> None:
    for measure in (volume_ml, longest_diameter_mm):
        with pytest.raises(UsageError, match="spacing"):
            measure(np.zeros((2, 3, 4)), (1, 1))
