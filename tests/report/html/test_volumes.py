"""Volumes in a page hold what they were made of."""

from __future__ import annotations

import base64
import gzip
import math

import numpy as np
import pytest

from lungkit.errors import UsageError
from lungkit.report.html.volumes import PackedVolume, halving, pack_image, pack_map, pack_mask


def unpacked(volume: PackedVolume) -> np.ndarray:
    """What the browser makes of it, as (Z, Y, X)."""
    data = np.frombuffer(gzip.decompress(base64.b64decode(volume.text)), np.uint8)
    shape = volume.shape[::-1]
    if volume.coding == "i16":
        low, high = data.reshape(2, -1).astype(np.uint16)
        folded = low | (high << 8)
        steps = (folded >> 1).astype(np.int16) ^ -(folded & 1).astype(np.int16)
        data = np.cumsum(steps.reshape(shape), axis=-1, dtype=np.int16)
    return data.reshape(shape) * volume.scale + volume.intercept


def test_hounsfield_units_come_back_as_they_were() -> None:
    image = np.random.default_rng(0).integers(-1024, 3072, (3, 5, 7)).astype(np.int16)
    np.testing.assert_array_equal(unpacked(pack_image(image, (1, 1, 1))), image)


def test_differences_that_overflow_come_back_too() -> None:
    image = np.array([[[-32768, 32767, -32768, 0]]], np.int32)
    image[0, 0, 3] = 5
    packed = pack_image(np.abs(image).clip(0, 32767), (1, 1, 1))
    np.testing.assert_array_equal(unpacked(packed), [[[32767, 32767, 32767, 5]]])


def test_floats_of_another_unit_are_scaled_over_their_range() -> None:
    image = np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    np.testing.assert_allclose(unpacked(pack_image(image, (1, 1, 1))), image, atol=2e-5)


def test_a_large_scan_is_halved_by_the_mean_of_its_voxels() -> None:
    image = np.arange(2 * 4 * 5, dtype=np.int16).reshape(2, 4, 5)
    packed = pack_image(image, (5.0, 1.0, 1.0), max_voxels=20)
    assert packed.factor == (2, 2, 1)
    assert packed.shape == (3, 2, 2)
    assert unpacked(packed)[0, 0, 0] == image[0, :2, :2].mean()
    assert unpacked(packed)[1, 1, 2] == image[1, 2:, 4].mean().round()  # a block at the border


@pytest.mark.parametrize("shape", [(512, 512, 300), (1, 4000, 1), (3, 2, 5000)])
def test_halving_ends_below_the_limit(shape: tuple[int, int, int]) -> None:
    factor = halving(shape, (0.7, 0.7, 1.0), 1000)
    assert math.prod(-(-size // step) for size, step in zip(shape, factor, strict=True)) <= 1000


def test_a_mask_is_cropped_and_lies_where_it_was() -> None:
    mask = np.zeros((4, 6, 8), np.uint8)
    mask[1:3, 2, 3:6] = 2
    packed = pack_mask(mask)
    assert (packed.offset, packed.shape) == ((3, 2, 1), (3, 1, 2))
    assert (unpacked(packed) == 2).all()


def test_an_empty_mask_holds_no_voxel() -> None:
    assert pack_mask(np.zeros((2, 3, 4), np.uint8)).shape == (0, 0, 0)


def test_a_mask_of_values_beyond_a_byte_is_refused() -> None:
    with pytest.raises(UsageError, match="from 0 to 300; a page takes 0 to 255"):
        pack_mask(np.full((1, 1, 2), [0, 300]))


def test_a_map_keeps_a_step_of_its_limits() -> None:
    values = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_allclose(unpacked(pack_map(values, (1, 1, 1))), values, atol=0.5 / 255 + 1e-6)
