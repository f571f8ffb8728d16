"""Reading the files of one case: one grid, declared labels only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lungkit.data import open_dataset, read_case, write_nifti
from lungkit.data.dataset import map_labels
from lungkit.errors import DataError, UsageError

AFFINE = np.diag([-0.75, -0.75, 2.5, 1.0])

Builder = Callable[..., Path]


def test_channels_and_mask_come_back(nnunet_folder: Builder) -> None:
    dataset = open_dataset(nnunet_folder(channels=2))
    volumes, label = read_case(dataset.case("case_a"), dataset.label_map)
    assert len(volumes) == 2
    assert label is not None
    assert label.array.dtype == np.uint8
    assert int(label.array.sum()) == 4 * 4 * 3


def test_unknown_case_is_a_usage_error(nnunet_folder: Builder) -> None:
    with pytest.raises(UsageError, match=r"no case 'case_z'.*2 cases"):
        open_dataset(nnunet_folder()).case("case_z")


def test_mask_of_another_shape_is_refused_with_both(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    write_nifti(root / "labelsTr" / "case_a.nii.gz", np.zeros((12, 10, 5), np.uint8), AFFINE)
    dataset = open_dataset(root)
    with pytest.raises(DataError, match=r"shape \(12, 10, 5\), but .*_0000.* has \(12, 10, 6\)"):
        read_case(dataset.case("case_a"), dataset.label_map)


def test_mask_of_another_place_is_refused_with_both_affines(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    shifted = AFFINE.copy()
    shifted[2, 3] = 0.01
    write_nifti(root / "labelsTr" / "case_a.nii.gz", np.zeros((12, 10, 6), np.uint8), shifted)
    dataset = open_dataset(root)
    with pytest.raises(DataError, match=r"0 0 2\.5 0\.01\] differs by 0\.01 .*0 0 2\.5 0\]"):
        read_case(dataset.case("case_a"), dataset.label_map)


def test_difference_within_rounding_is_accepted(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    shifted = AFFINE.copy()
    shifted[2, 3] = 0.0005
    write_nifti(root / "labelsTr" / "case_a.nii.gz", np.zeros((12, 10, 6), np.uint8), shifted)
    dataset = open_dataset(root)
    _, label = read_case(dataset.case("case_a"), dataset.label_map)
    assert label is not None


def test_channel_of_another_shape_is_refused(nnunet_folder: Builder) -> None:
    root = nnunet_folder(channels=2)
    write_nifti(root / "imagesTr" / "case_a_0001.nii.gz", np.zeros((12, 9, 6), np.int16), AFFINE)
    dataset = open_dataset(root)
    with pytest.raises(DataError, match=r"_0001\.nii\.gz: shape \(12, 9, 6\)"):
        read_case(dataset.case("case_a"), dataset.label_map)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_undeclared_value_is_named_with_its_count(nnunet_folder: Builder, dtype: type) -> None:
    root = nnunet_folder()
    mask = np.zeros((12, 10, 6), dtype)
    mask[0, 0, :3] = 7
    write_nifti(root / "labelsTr" / "case_a.nii.gz", mask, AFFINE)
    dataset = open_dataset(root)
    with pytest.raises(DataError, match=r"undeclared label 7 \(3 voxels\); the dataset declares \[0, 1\]"):
        read_case(dataset.case("case_a"), dataset.label_map)


def test_fractional_label_is_refused() -> None:
    with pytest.raises(DataError, match=r"undeclared label 0\.5 \(1 voxels\)"):
        map_labels(np.array([0.0, 0.5, 1.0]), {0: 0, 1: 1}, "mask")


def test_negative_label_is_refused() -> None:
    with pytest.raises(DataError, match="undeclared label -1"):
        map_labels(np.array([0, -1], np.int16), {0: 0, 1: 1}, "mask")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_labels_with_gaps_become_contiguous(dtype: type) -> None:
    array = np.array([[0, 4], [9, 200]], dtype)
    mapped = map_labels(array, {0: 0, 4: 1, 9: 2, 200: 255}, "mask")
    assert mapped.dtype == np.uint8
    assert mapped.tolist() == [[0, 1], [2, 255]]


def test_whole_floats_are_labels() -> None:
    assert map_labels(np.array([0.0, 1.0], np.float32), {0: 0, 1: 1}, "mask").dtype == np.uint8


def test_declared_order_is_by_value(nnunet_folder: Builder) -> None:
    dataset = open_dataset(nnunet_folder(labels={"tumour": 5, "background": 0, "node": 3}))
    assert dataset.label_map == {0: 0, 3: 1, 5: 2}
    assert dataset.class_names == ("background", "node", "tumour")
