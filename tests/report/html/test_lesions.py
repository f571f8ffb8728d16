"""The table of lesions tells where they are and how dense."""

from __future__ import annotations

import numpy as np
import pytest

from lungkit.data import Volume
from lungkit.data.geometry import orient, plan_geometry
from lungkit.report.html.lesions import find_lesions, lps_matrix

AFFINE = np.array([[0, -0.8, 0, 90.0], [-0.7, 0, 0, -40.0], [0, 0, -2.5, 300.0], [0, 0, 0, 1.0]])


def test_places_are_patient_coordinates_of_any_orientation() -> None:
    stored = np.zeros((7, 6, 5), np.uint8)
    stored[4, 1, 2] = 1
    volume = Volume(stored, AFFINE)
    geometry = plan_geometry(volume)
    (lesion,), _ = find_lesions(orient(stored, geometry), geometry, {"tumour": 1})
    right, front, head = (AFFINE @ [4, 1, 2, 1])[:3]
    assert lesion.centre_lps_mm == pytest.approx((-right, -front, head))
    assert lps_matrix(geometry) @ [*lesion.voxel, 1] == pytest.approx(lesion.centre_lps_mm)


def test_the_voxel_to_jump_to_lies_in_a_hollow_lesion() -> None:
    mask = np.zeros((1, 9, 9), np.uint8)
    mask[0, 1:8, 1:8] = 1
    mask[0, 2:7, 2:7] = 0
    (lesion,), _ = find_lesions(mask, plan_geometry(Volume(mask.T, np.eye(4))), {"tumour": 1})
    x, y, z = lesion.voxel
    assert mask[z, y, x] == 1


def test_grey_value_and_confidence_are_means_within_the_lesion() -> None:
    mask = np.zeros((1, 4, 4), np.uint8)
    mask[0, 1, 1:3] = 1
    image = np.full(mask.shape, -900, np.int16)
    image[0, 1, 1:3] = [20, 60]
    probability = np.where(mask, 0.75, 0.1).astype(np.float32)
    (lesion,), _ = find_lesions(
        mask,
        plan_geometry(Volume(mask.T, np.eye(4))),
        {"tumour": 1},
        image=image,
        probabilities={"tumour": probability},
    )
    assert (lesion.mean_value, lesion.confidence) == (40.0, 0.75)


def test_the_largest_comes_first_over_all_classes() -> None:
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[0, 0, 0] = 1
    mask[0, 4:6, 4:6] = 2
    found, total = find_lesions(
        mask, plan_geometry(Volume(mask.T, np.eye(4))), {"background": 0, "a": 1, "b": 2}
    )
    assert [(lesion.label, lesion.voxels) for lesion in found] == [("b", 4), ("a", 1)]
    assert total == 2


def test_of_many_lesions_the_largest_are_measured_and_all_are_counted() -> None:
    mask = np.zeros((1, 9, 40), np.uint8)
    for number in range(8):
        mask[0, 1 : 2 + number, 5 * number] = 1
    found, total = find_lesions(mask, plan_geometry(Volume(mask.T, np.eye(4))), {"tumour": 1}, most=3)
    assert ([lesion.voxels for lesion in found], total) == ([8, 7, 6], 8)
