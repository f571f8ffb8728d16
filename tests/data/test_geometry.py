"""To RAS and ZYX, and back onto the scan's own grid."""

from __future__ import annotations

import itertools
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lungkit.data import Volume
from lungkit.data.geometry import orient, plan_geometry
from lungkit.data.preprocessing import preprocess_label
from lungkit.data.resampling import resample_nearest

ORIENTATIONS = [
    "".join(letters[flip] for letters, flip in zip(order, flips, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for flips in itertools.product((0, 1), repeat=3)
]
SPACING_RAS = (0.7, 0.9, 2.5)


def store_as(codes: str, ras: np.ndarray, affine: np.ndarray) -> Volume:
    """The voxels ``ras``, stored in RAS, as nibabel stores them in the orientation ``codes``."""
    wanted = nib.orientations.axcodes2ornt(tuple(codes))
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt(("R", "A", "S")), wanted)
    image: Any = nib.Nifti1Image(ras, affine).as_reoriented(change)
    assert "".join(nib.aff2axcodes(image.affine)) == codes
    return Volume(np.asarray(image.dataobj), image.affine)


def scan_in(codes: str) -> tuple[Volume, np.ndarray]:
    """A scan stored in the orientation ``codes``, and the same voxels in RAS."""
    ras = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    affine = np.diag([*SPACING_RAS, 1.0])
    affine[:3, 3] = (10, -20, 30)
    return store_as(codes, ras, affine), ras


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_each_orientation_becomes_zyx_of_ras(codes: str) -> None:
    volume, ras = scan_in(codes)
    geometry = plan_geometry(volume)
    np.testing.assert_array_equal(orient(volume.array, geometry), ras.transpose(2, 1, 0))
    assert geometry.shape == (5, 4, 3)
    np.testing.assert_allclose(geometry.spacing_mm, SPACING_RAS[::-1])


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_each_orientation_is_restored_exactly(codes: str) -> None:
    volume, _ = scan_in(codes)
    geometry = plan_geometry(volume)
    label = np.ascontiguousarray(orient(volume.array, geometry))
    restored = np.zeros_like(volume.array)
    orient(restored, geometry)[...] = label
    np.testing.assert_array_equal(restored, volume.array)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SLA", "IPR"])
def test_resampled_mask_returns_to_its_place(codes: str) -> None:
    ras = np.zeros((24, 20, 16), np.uint8)
    ras[5:15, 4:12, 3:11] = 1
    volume = store_as(codes, ras, np.diag([0.8, 0.8, 2.0, 1.0]))
    geometry = plan_geometry(volume, target_spacing_mm=(1.0, 0.4, 0.4))  # finer: nothing can be lost
    restored = np.zeros_like(volume.array)
    label = preprocess_label(volume, geometry)
    orient(restored, geometry)[...] = resample_nearest(label, geometry.oriented_shape)
    np.testing.assert_array_equal(restored, volume.array)


def test_oblique_scan_takes_the_nearest_axes() -> None:
    angle = np.deg2rad(20)
    affine = np.eye(4)
    affine[:2, :2] = [[-np.cos(angle), np.sin(angle)], [-np.sin(angle), -np.cos(angle)]]
    array = np.arange(24).reshape(2, 3, 4)
    geometry = plan_geometry(Volume(array, affine))
    np.testing.assert_array_equal(orient(array, geometry), array[::-1, ::-1].transpose(2, 1, 0))


def test_field_of_view_is_kept_when_the_spacing_does_not_divide_it() -> None:
    volume = Volume(np.zeros((10, 10, 23)), np.diag([1.0, 1.0, 1.25, 1.0]))
    geometry = plan_geometry(volume, target_spacing_mm=(1.0, 3.0, 1.0))
    assert geometry.shape == (29, 3, 10)
    np.testing.assert_allclose(np.multiply(geometry.shape, geometry.spacing_mm), (28.75, 10, 10))


def test_single_slice_is_not_resampled_along_its_axis() -> None:
    volume = Volume(np.zeros((10, 10, 1)), np.diag([1.0, 1.0, 5.0, 1.0]))
    geometry = plan_geometry(volume, target_spacing_mm=(1.0, 2.0, 2.0))
    assert geometry.shape == (1, 5, 5)
    assert geometry.spacing_mm == (5.0, 2.0, 2.0)
