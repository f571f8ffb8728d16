"""Lesions of masks: what they are worth, and which of them are large enough to stay."""

from __future__ import annotations

import numpy as np
import pytest

from lungkit.inference.lesions import Lesions, beside_largest, voxels_of


def test_volumes_count_in_voxels_upwards():
    assert [voxels_of(ml, (5.0, 2.0, 1.0)) for ml in (0.0, 0.01, 0.0101, 0.5)] == [0, 1, 2, 50]


def test_masses_and_classes_are_those_of_each_lesion():
    label = np.zeros((2, 3, 9), np.uint8)
    label[0, 0, :2], label[:, 2, 3:5], label[1, 0, 7:] = 1, 3, 1
    probability = np.arange(label.size, dtype=np.uint8).reshape(label.shape)
    lesions = Lesions.find(label)
    masses, classes = lesions.masses(probability), lesions.classes_in(label)
    assert sorted(zip(classes.tolist(), masses.tolist(), strict=True)) == [
        (0, 0.0),
        (1, 0.0 + 1),
        (1, 34.0 + 35),
        (3, 21.0 + 22 + 48 + 49),
    ]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
def test_a_lesion_of_just_the_share_stays_whatever_the_rounding(share):
    whole = np.arange(1, 301) * 10.0
    for largest in whole:
        masses = np.array([0.0, largest, np.round(share * largest)])
        assert beside_largest(masses > 0, masses, np.array([0, 1, 1]), share)[2]
    masses = np.array([0.0, 1e6, share * 1e6 - 1])
    assert not beside_largest(masses > 0, masses, np.array([0, 1, 1]), share)[2]


def test_where_no_lesion_is_left_none_is():
    assert not beside_largest(np.zeros(3, bool), np.ones(3), np.array([0, 1, 1]), 0.5).any()
