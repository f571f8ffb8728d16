"""Scans read and resampled a few rows at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lungkit.data import Preprocessing, Volume, preprocess_image
from lungkit.data.geometry import plan_geometry
from lungkit.data.preprocessing import ChannelNormalisation
from lungkit.data.resampling import resample_linear
from lungkit.inference.rows import (
    RecentRows,
    ResampledRows,
    ScanRows,
    StreamedRows,
    TensorRows,
    linear_weights,
    smallest,
)

PLAN = Preprocessing(window=(-1000, 400), mean=-300, std=250, units="HU", label_map={0: 0, 1: 1})


def read_in_pieces(rows, step):
    depth = rows.shape[1]
    return torch.cat(
        [rows.read(first, min(first + step, depth)).clone() for first in range(0, depth, step)], 1
    )


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize("spacing", [None, (2.0, 1.0, 1.0), (4.0, 0.9, 0.6)])
def test_a_scan_by_rows_equals_the_whole_scan(spacing, step):
    rng = np.random.default_rng(0)
    affine = np.array([[0, -0.8, 0, 5], [0.7, 0, 0, 1], [0, 0, 2.5, -3], [0, 0, 0, 1.0]])
    volumes = [Volume(rng.integers(-1200, 900, (17, 14, 11)).astype(np.int16), affine) for _ in range(2)]
    plan = Preprocessing(
        window=(-1000, 400), mean=-300, std=250, units="HU", label_map={0: 0, 1: 1}, target_spacing_mm=spacing,
        other_channels=(ChannelNormalisation((-500, 500), 10, 100, "HU"),),
    )  # fmt: skip
    whole = preprocess_image(volumes, plan)
    rows = ScanRows(volumes, plan, plan_geometry(volumes[0], target_spacing_mm=spacing))
    found = read_in_pieces(rows, step)
    assert found.shape == whole.array.shape
    np.testing.assert_allclose(found.numpy(), whole.array, atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [(5, 5), (5, 12), (12, 5), (1, 4), (4, 1), (7, 3), (40, 41)])
def test_the_weights_are_those_of_the_antialiased_resampling(old, new):
    values = np.random.default_rng(1).standard_normal(old).astype(np.float32)
    low, high, weights = linear_weights(old, new, 0, new)
    found = weights.numpy() @ values[low:high]
    np.testing.assert_allclose(found, resample_linear(values, (new,)), atol=1e-5)


def test_streamed_rows_are_those_of_the_parts_though_a_part_is_overwritten():
    image = torch.arange(22.0).reshape(1, 11, 2, 1)

    def parts():
        buffer = torch.empty(1, 3, 2, 1)
        for first in range(0, 11, 3):
            last = min(first + 3, 11)
            buffer[:, : last - first] = image[:, first:last]
            yield first, last, buffer[:, : last - first]
            buffer.fill_(-1)

    rows = StreamedRows(parts(), (1, 11, 2, 1))
    for first, last in [(0, 2), (1, 4), (3, 8), (7, 8), (8, 11)]:
        assert torch.equal(rows.read(first, last), image[:, first:last])


def test_rows_that_windows_share_are_read_once():
    asked = []

    class Counting(TensorRows):
        def read(self, first, last):
            asked.append((first, last))
            return super().read(first, last)

    rows = RecentRows(Counting(torch.arange(10.0).reshape(1, 10, 1, 1)))
    for first in range(0, 7, 2):
        assert rows.read(first, first + 4).flatten().tolist() == list(range(first, first + 4))
    assert asked == [(0, 4), (4, 6), (6, 8), (8, 10)]


def test_rows_resampled_to_their_own_size_stay_as_they_are():
    image = torch.randn(2, 5, 4, 3)
    assert torch.equal(read_in_pieces(ResampledRows(TensorRows(image), (5, 4, 3)), 2), image)


def test_the_smallest_value_of_each_channel_is_found():
    image = torch.randn(2, 5, 4, 3)
    assert torch.equal(smallest(TensorRows(image)), image.flatten(1).amin(1))
