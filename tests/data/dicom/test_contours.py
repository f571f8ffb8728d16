"""Polygons to pixels and back."""

from __future__ import annotations

import numpy as np
import pytest

from lungkit.data.dicom.contours import fill_polygons, trace_polygons

SHAPE = (40, 50)


def polygon(seed: int, corners: int = 12) -> np.ndarray:
    """A polygon that crosses itself and leaves the image here and there."""
    return np.random.default_rng(seed).uniform((-6, -6), (56, 46), (corners, 2))


@pytest.mark.parametrize("seed", range(5))
def test_filling_is_even_odd_over_pixel_centres(seed: int) -> None:
    points = polygon(seed)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    crossings = np.zeros(SHAPE, int)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        spans = (y0 > y) != (y1 > y)
        with np.errstate(divide="ignore"):
            crossings += spans & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    np.testing.assert_array_equal(fill_polygons([points], SHAPE), crossings % 2 == 1)


def test_an_inner_contour_cuts_a_hole_and_a_separate_one_adds() -> None:
    outer = np.array([[0.5, 0.5], [8.5, 0.5], [8.5, 8.5], [0.5, 8.5]])
    filled = fill_polygons([outer, outer / 2 + 2, outer + 20], SHAPE)
    expected = np.zeros(SHAPE, bool)
    expected[1:9, 1:9] = True
    expected[3:7, 3:7] = False
    expected[21:29, 21:29] = True
    np.testing.assert_array_equal(filled, expected)


def test_polygons_that_share_an_edge_through_centres_share_no_pixel() -> None:
    left = np.array([[0, 0], [5, 0], [5, 6], [0, 6]], float)
    both = fill_polygons([left], SHAPE).astype(int) + fill_polygons([left + np.array([5, 0])], SHAPE)
    assert both.max() == 1
    assert both.sum() == 60


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5, 0.8, 0.98])
def test_tracing_and_filling_give_any_mask_back(density: float) -> None:
    mask = np.random.default_rng(3).random(SHAPE) < density
    polygons = trace_polygons(mask)
    np.testing.assert_array_equal(fill_polygons(polygons, SHAPE), mask)
    # Contours in a file are rounded and turned with the patient: still the same mask.
    turn = np.array([[0.8, 0.6], [-0.6, 0.8]])
    rounded = [np.round(points @ turn * 0.7, 4) / 0.7 @ turn.T for points in polygons]
    np.testing.assert_array_equal(fill_polygons(rounded, SHAPE), mask)


def test_one_closed_polygon_for_each_region_with_its_holes_as_keyholes() -> None:
    mask = np.zeros((9, 9), bool)
    mask[:7, :7] = True
    mask[1, 1:3] = mask[3:6, 1:6] = False
    mask[4, 3] = True  # an island in the second hole
    mask[7, 7] = True  # touches the first region at a corner
    polygons = trace_polygons(mask)
    assert sorted(len(points) for points in polygons) == [4, 4, 4 + 2 * (4 + 2)]
    np.testing.assert_array_equal(fill_polygons(polygons, mask.shape), mask)


def test_an_empty_mask_has_no_contour() -> None:
    assert trace_polygons(np.zeros((4, 4), bool)) == []
