"""Points and boxes of the world on a scan's grid, however the scan is stored."""

from __future__ import annotations

import numpy as np
import pytest

from lungkit.data import Volume
from lungkit.data.geometry import orient, plan_geometry
from lungkit.errors import UsageError
from lungkit.inference.world_points import Box, box_walls, voxel_at

RAS = np.array([[0.7, 0, 0, -60], [0, 0.7, 0, -50], [0, 0, 2.0, 100], [0, 0, 0, 1.0]])
SAGITTAL_FIRST = np.array([[0, 0, -0.7, 60], [2.0, 0, 0, -50], [0, -0.7, 0, 100], [0, 0, 0, 1.0]])


def scan(affine: np.ndarray) -> Volume:
    return Volume(np.arange(18 * 16 * 4, dtype=np.int16).reshape(18, 16, 4), affine)


def world(affine: np.ndarray, index: tuple[float, float, float]) -> tuple[float, float, float]:
    x, y, z = (affine @ [*index, 1.0])[:3]
    return float(x), float(y), float(z)


@pytest.mark.parametrize("affine", [RAS, SAGITTAL_FIRST], ids=["ras", "sagittal first"])
def test_a_point_is_the_voxel_that_holds_it(affine):
    stored = scan(affine)
    geometry = plan_geometry(stored)
    place = voxel_at(world(affine, (3.4, 11.6, 2.3)), geometry, stored)
    assert orient(stored.array, geometry)[tuple(place)] == stored.array[3, 12, 2]


@pytest.mark.parametrize("affine", [RAS, SAGITTAL_FIRST], ids=["ras", "sagittal first"])
def test_a_box_holds_the_voxels_whose_centres_lie_in_it(affine):
    stored = scan(affine)
    geometry = plan_geometry(stored)
    walls = box_walls(Box(world(affine, (14, 2, 3)), world(affine, (5, 9.4, 1))), geometry)
    inside = orient(stored.array, geometry)[walls]
    assert set(inside.ravel()) == set(stored.array[5:15, 2:10, 1:4].ravel())


def test_a_point_outside_says_where_it_and_the_scan_lie_in_both_systems():
    stored = scan(RAS)
    message = r"70, -2, 101 mm \(RAS; in LPS, DICOM's, -70, 2, 101\).*x -60\.4 to -47\.8.*RAS.*x 47\.8 to 60\.4.*LPS"
    with pytest.raises(UsageError, match=message):
        voxel_at((70.0, -2.0, 101.0), plan_geometry(stored), stored)


def test_a_point_that_is_no_number_is_refused():
    stored = scan(RAS)
    with pytest.raises(UsageError, match="finite"):
        voxel_at((0.0, float("nan"), 110.0), plan_geometry(stored), stored)


def test_a_box_without_a_voxel_is_refused():
    with pytest.raises(UsageError, match="no voxel"):
        box_walls(Box((0, 0, 101.1), (0.1, 0.1, 101.2)), plan_geometry(scan(RAS)))
