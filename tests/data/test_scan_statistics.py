"""Statistics, limits and the box of what is not 0, against numpy on the whole scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_fill_holes

from lungkit.data import Volume
from lungkit.data.normalisation import ChannelNormalisation, Statistics
from lungkit.data.scan_statistics import LimitedSlices, NormalisedSlices, cropped, filled, nonzero_box
from lungkit.data.slices import TensorSlices


def test_a_crop_lies_where_it_was() -> None:
    array = np.zeros((6, 7, 8), np.int16)
    array[2:4, 1:6, 3] = 5
    volume = Volume(array, np.diag([-0.7, 0.7, 2.0, 1.0]))
    inner = cropped(volume, nonzero_box([volume]))
    assert inner.array.shape == (2, 5, 1) and (inner.array == 5).all()
    np.testing.assert_allclose(inner.affine @ [0, 0, 0, 1], volume.affine @ [2, 1, 3, 1])


def test_a_scan_of_zeros_is_not_cropped() -> None:
    volume = Volume(np.zeros((2, 3, 4)), np.eye(4))
    assert cropped(volume, nonzero_box([volume])).array.shape == (2, 3, 4)


def test_holes_are_those_of_scipy() -> None:
    mask = np.random.default_rng(0).random((9, 10, 11)) > 0.35
    np.testing.assert_array_equal(filled(mask), binary_fill_holes(mask))


@pytest.mark.parametrize("statistics", ["scan", "nonzero", "range"])
def test_a_scan_is_normalised_by_its_own_statistics(statistics: Statistics) -> None:
    image = np.random.default_rng(0).normal(40, 7, (1, 5, 6, 7)).astype(np.float32)
    inside = np.zeros((5, 6, 7), bool)
    inside[1:, 2:] = True
    channel = ChannelNormalisation(None, 0.0, 1.0, "arbitrary", statistics)
    found = NormalisedSlices(TensorSlices(torch.from_numpy(image)), [channel], inside).read(1, 4)
    values = image[0][inside] if statistics == "nonzero" else image
    expected = (image - values.mean()) / values.std()
    if statistics == "range":
        expected = (image - image.min()) / (image.max() - image.min())
    if statistics == "nonzero":
        expected = np.where(inside, expected, image)
    np.testing.assert_allclose(found, expected[:, 1:4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_values_beyond_the_limits_of_the_source_are_cut_off(axis: int | None) -> None:
    source = torch.rand(2, 4, 5, 6)
    overshoot = source * 3 - 1
    kept = [n for n in (1, 2, 3) if axis is None or n != axis + 1]
    expected = overshoot.clamp(source.amin(kept, keepdim=True), source.amax(kept, keepdim=True))
    found = LimitedSlices(TensorSlices(overshoot), TensorSlices(source), axis)
    assert torch.equal(torch.cat([found.read(0, 3), found.read(3, 4)], 1), expected)
