"""How patches are laid, and how large and how many at a time they are."""

from __future__ import annotations

import itertools

import pytest
import torch

from lungkit.errors import UsageError
from lungkit.inference import gaussian_weights, patch_starts
from lungkit.inference.patches import (
    PatchAxis,
    Tiling,
    count_patches,
    patches_per_call,
    prediction_patch,
    smaller_patch,
)


@pytest.mark.parametrize("extent", [1, 7, 8, 9, 64, 100, 101])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.95])
def test_patches_cover_the_axis_and_overlap_enough(extent: int, overlap: float) -> None:
    patch = 8
    starts = patch_starts(extent, patch, overlap=overlap)
    assert starts[0] == 0
    assert starts[-1] == max(extent - patch, 0)
    steps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(0 < step <= max(1, patch * (1 - overlap)) for step in steps)


@pytest.mark.parametrize("weighting", ["gaussian", "constant"])
@pytest.mark.parametrize(("extent", "patch"), [(8, 8), (30, 8), (31, 9)])
def test_the_weights_of_the_patches_that_hold_a_voxel_add_up_to_one(extent, patch, weighting):
    axis = PatchAxis(extent, patch, 0.5, weighting, torch.device("cpu"))
    total = torch.zeros(extent)
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        total[start : start + patch] += weights
    torch.testing.assert_close(total, torch.ones(extent))


def test_the_gaussian_has_a_standard_deviation_of_an_eighth_of_the_patch():
    weights = gaussian_weights(65)
    assert weights[32] == 1 and weights[32 + 8] / weights[32] == pytest.approx(
        torch.exp(torch.tensor(-0.5 * (8 / (65 / 8)) ** 2)).item()
    )
    assert torch.equal(weights, weights.flip(0))


def test_patches_are_halved_along_their_longest_axis_but_not_below_32_voxels():
    assert smaller_patch((64, 128, 128), 0) == (64, 128, 128)
    assert smaller_patch((64, 128, 128), 3) == (32, 32, 32)
    assert smaller_patch((16, 63, 63), 2) == (16, 63, 63)


def test_slices_are_whole_for_a_2d_network_and_counted_as_such():
    shape = (10, 300, 200)
    assert prediction_patch((96, 96), shape) == (300, 200)
    assert count_patches(shape, (300, 200), 0.5) == 10
    assert count_patches(shape, (8, 100, 100), 0.0) == 2 * 3 * 2


def test_small_patches_go_to_the_device_together():
    assert patches_per_call("cpu", (64, 64)) > patches_per_call("cpu", (512, 512)) == 1
    assert (
        patches_per_call("cuda", (64, 64))
        > patches_per_call("cpu", (64, 64))
        == patches_per_call("mps", (64, 64))
    )


def test_steps_that_are_no_whole_numbers_are_rounded_before_or_after_patches_are_counted() -> None:
    assert patch_starts(28, 7, overlap=0.5) == [0, 3, 6, 9, 12, 15, 18, 21]
    assert patch_starts(28, 7, overlap=0.5, whole_steps=False) == [0, 4, 7, 10, 14, 18, 21]


def test_a_gaussian_may_be_centred_on_a_voxel() -> None:
    weights = gaussian_weights(8, centre=4)
    assert weights.argmax() == 4 and weights[4] == 1 and weights[3] == weights[5]


def test_a_tiling_that_makes_no_sense_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="padding"):
        Tiling(padding="mirror")  # type: ignore[arg-type]
