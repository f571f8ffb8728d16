"""Volumes, diameters and positions in reports."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from lungkit.data import write_nifti
from lungkit.pipeline import measure_mask, separate_lesions

LABELS = {"background": 0, "tumour": 1, "node": 3}


def test_a_box_by_hand():
    mask = np.zeros((20, 16, 10), np.uint8)
    mask[2:6, 3:6, 4:6] = 1  # 4 x 3 x 2 voxels of 0.5 x 1 x 2 mm
    found = measure_mask(mask, np.diag([0.5, 1.0, 2.0, 1.0]), LABELS)
    assert found["tumour"]["volume_ml"] == 0.024
    assert found["node"] == {"volume_ml": 0.0, "longest_diameter_mm": 0.0, "lesions": []}
    (lesion,) = found["tumour"]["lesions"]
    assert lesion["voxels"] == 24 and lesion["centroid_lps_mm"] == [-1.75, -4.0, 9.0]
    assert (
        lesion["longest_diameter_mm"]
        == found["tumour"]["longest_diameter_mm"]
        == pytest.approx(np.hypot(1.5, 3.0), abs=0.01)  # between the middles of outer faces
    )


def test_lesions_are_listed_from_the_largest_and_by_class():
    mask = np.zeros((12, 12, 5), np.uint8)
    mask[1, 1, 1], mask[4:6, 4:6, 2], mask[9, 9, 3] = 1, 1, 3
    found = measure_mask(mask, np.eye(4), LABELS)
    assert [lesion["voxels"] for lesion in found["tumour"]["lesions"]] == [4, 1]
    assert [lesion["voxels"] for lesion in found["node"]["lesions"]] == [1]


def test_lesions_are_numbered_where_they_lie_in_the_order_of_their_measures():
    mask = np.zeros((12, 12, 5), np.uint8)
    mask[1, 1, 1], mask[4:6, 4:6, 2], mask[9, 9, 3], mask[9, 1, 1:3] = 1, 1, 3, 1
    image = np.where(mask > 0, 100 * mask.astype(np.int16), -900)
    image[1, 1, 1] = -20
    affine = np.diag([-0.5, 0.5, 2.0, 1.0])
    numbers, found = separate_lesions(mask, affine, LABELS, image, most=3)
    assert numbers[4, 5, 2] == 1 and numbers[9, 1, 2] == 2 and numbers[1, 1, 1] == 3 and numbers[9, 9, 3] == 0
    assert [(name, lesion["voxels"], lesion["mean_intensity"]) for name, lesion in found] == [
        ("tumour", 4, 100.0),
        ("tumour", 2, 100.0),
        ("tumour", 1, -20.0),
    ]
    measured = measure_mask(mask, affine, LABELS, image=image)["tumour"]["lesions"]
    assert [lesion for _, lesion in found] == measured
    assert (measured[0]["longest_diameter_mm"], measured[0]["short_diameter_mm"]) == (1.12, 1.12)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)])
def test_the_centroid_is_where_simpleitk_has_the_voxel(tmp_path, axes, signs):
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[axis, column] = sign * (0.7, 0.9, 2.5)[column]
    affine[:3, 3] = (11, -20, 300)
    mask = np.zeros((8, 9, 10), np.uint8)
    mask[5, 2, 7] = 1
    write_nifti(tmp_path / "mask.nii.gz", mask, affine)
    point = sitk.ReadImage(str(tmp_path / "mask.nii.gz")).TransformIndexToPhysicalPoint((5, 2, 7))
    (lesion,) = measure_mask(mask, nibabel.load(tmp_path / "mask.nii.gz").affine, LABELS)["tumour"]["lesions"]
    np.testing.assert_allclose(lesion["centroid_lps_mm"], point, atol=0.01)


def test_a_region_is_measured_with_what_lies_inside_it():
    mask = np.zeros((12, 12, 3), np.uint8)
    mask[2:8, 2:8, 1], mask[4:6, 4:6, 1] = 1, 2
    labels, affine = {"background": 0, "whole": 1, "core": 2}, np.diag([1.0, 1.0, 1.0, 1.0])
    found = measure_mask(mask, affine, labels, regions={"whole": (1, 2), "core": (2,)})
    assert [found[name]["lesions"][0]["voxels"] for name in ("whole", "core")] == [36, 4]
    assert measure_mask(mask, affine, labels)["whole"]["lesions"][0]["voxels"] == 32
