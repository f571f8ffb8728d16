"""Resampling keeps voxel centres where they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lungkit.data.resampling import Filter, axis_weights, resample_nearest, resample_plane
from lungkit.data.slices import ResampledSlices, TensorSlices


def resample_linear(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Up to three axes, as the slices of a scan."""
    image = torch.from_numpy(array).reshape(1, *(1,) * (3 - array.ndim), *array.shape)
    depth, height, width = (*(1,) * (3 - array.ndim), *shape)
    return ResampledSlices(TensorSlices(image), (depth, height, width)).read(0, depth).numpy().reshape(shape)


@pytest.mark.parametrize("shape", [(7, 9, 11), (12, 9, 20), (7, 31, 12)])
def test_finer_grid_equals_torch_trilinear(shape: tuple[int, int, int]) -> None:
    array = np.random.default_rng(0).normal(size=(7, 9, 11)).astype(np.float32)
    expected = F.interpolate(
        torch.from_numpy(array)[None, None], shape, mode="trilinear", align_corners=False
    )
    np.testing.assert_allclose(resample_linear(array, shape), expected[0, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8), (10, 30), (30, 7), (1, 1)])
def test_coarser_grid_equals_torch_antialiased_bilinear(shape: tuple[int, int]) -> None:
    array = np.random.default_rng(0).normal(size=(20, 24)).astype(np.float32)
    expected = F.interpolate(
        torch.from_numpy(array)[None, None], shape, mode="bilinear", align_corners=False, antialias=True
    )
    np.testing.assert_allclose(resample_linear(array, shape), expected[0, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 4, 3), (16, 9, 7), (3, 20, 13)])
def test_nearest_equals_torch_nearest_exact(shape: tuple[int, int, int]) -> None:
    array = np.random.default_rng(0).integers(0, 200, (8, 9, 10)).astype(np.uint8)
    expected = F.interpolate(torch.from_numpy(array)[None, None], shape, mode="nearest-exact")
    np.testing.assert_array_equal(resample_nearest(array, shape), expected[0, 0].numpy())


@pytest.mark.parametrize(("new", "tolerance"), [(64, 1e-3), (45, 1e-3), (16, 1e-3), (23, 0.05), (5, 0.05)])
def test_ramp_keeps_its_place_to_the_sub_voxel(new: int, tolerance: float) -> None:
    # Intensity = position in old voxels: after resampling it must be (j + 1/2) n/m - 1/2, away from the edge.
    # The widened filter is exact for whole ratios only.
    ramp = np.arange(32, dtype=np.float32)
    centres = (np.arange(new) + 0.5) * 32 / new - 0.5
    inside = (centres > 32 / new) & (centres < 31 - 32 / new)
    np.testing.assert_allclose(resample_linear(ramp, (new,))[inside], centres[inside], rtol=0, atol=tolerance)


def test_averaging_keeps_the_mean_of_a_fine_checkerboard() -> None:
    board = (np.indices((32, 32)).sum(axis=0) % 2).astype(np.float32)
    np.testing.assert_allclose(resample_linear(board, (8, 8))[2:-2, 2:-2], 0.5, atol=1e-5)


def test_constant_stays_constant_to_the_edge() -> None:
    np.testing.assert_allclose(resample_linear(np.full((6, 5), -1000, np.float32), (4, 17)), -1000, rtol=1e-6)


def test_same_shape_is_untouched() -> None:
    array = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(resample_linear(array, (3, 4)), array)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("shape", [(5, 9, 11), (20, 9, 5), (7, 31, 12)])
def test_a_few_slices_at_a_time_are_those_of_the_whole(shape: tuple[int, int, int], step: int) -> None:
    image = torch.randn(2, 7, 9, 11, generator=torch.Generator().manual_seed(0))
    whole = ResampledSlices(TensorSlices(image), shape).read(0, shape[0])
    slices = ResampledSlices(TensorSlices(image), shape)
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        torch.testing.assert_close(slices.read(first, last), whole[:, first:last], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(5, 5), (5, 12), (12, 5), (1, 4), (4, 1), (7, 3), (40, 41)])
def test_the_weights_along_z_are_those_of_torch_along_the_others(old: int, new: int) -> None:
    values = torch.randn(old, generator=torch.Generator().manual_seed(1))
    low, high, weights = axis_weights(old, new, 0, new)
    expected = F.interpolate(
        values.reshape(1, 1, 1, old), (1, new), mode="bilinear", align_corners=False, antialias=True
    )
    torch.testing.assert_close(weights @ values[low:high], expected.flatten(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(7, 11), (40, 23), (30, 30), (1, 5), (200, 190)])
@pytest.mark.parametrize(("filter", "order"), [("nearest", 0), ("linear", 1), ("cubic", 3)])
def test_filters_of_other_programs_are_scipys_splines(filter: Filter, order: int, old: int, new: int) -> None:
    from scipy.ndimage import zoom

    values = np.random.default_rng(0).normal(size=old)
    expected = zoom(values, new / old, order=order, mode="nearest", grid_mode=True)
    parts = []
    for first in range(0, new, 5):
        low, high, weights = axis_weights(old, new, first, min(first + 5, new), filter)
        parts.append(weights.numpy() @ values[low:high])
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=0, atol=2e-6)


def test_every_axis_of_a_plane_takes_its_own_filter() -> None:
    slices = torch.randn(2, 3, 9, 70)
    found = resample_plane(slices, (12, 150), ("nearest", "cubic"))
    rows = torch.from_numpy(resample_nearest(slices.numpy(), (2, 3, 12, 70)))
    low, high, weights = axis_weights(70, 150, 0, 150, "cubic")
    torch.testing.assert_close(found, rows[..., low:high] @ weights.T, rtol=0, atol=1e-5)
