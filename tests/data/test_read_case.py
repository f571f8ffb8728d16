"""Reading the files of one case: one grid, declared labels only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lungkit.data import fingerprint_dataset, open_dataset, read_case, read_volume, write_nifti
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


def orientations() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All 48 orders and directions of the axes."""
    return [
        (axes, signs)
        for axes in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]


@pytest.mark.parametrize("oblique", [False, True])
def test_a_mask_stored_in_any_orientation_is_turned_onto_its_scan(
    nnunet_folder: Builder, oblique: bool
) -> None:
    root = nnunet_folder(("case_a",))
    affine = AFFINE.copy()
    if oblique:
        turn = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
        affine[:3, :3] = turn @ affine[:3, :3]
    mask = np.random.default_rng(0).integers(0, 2, (12, 10, 6)).astype(np.uint8)
    for folder, name in (("imagesTr", "case_a_0000.nii.gz"), ("labelsTr", "case_a.nii.gz")):
        write_nifti(root / folder / name, mask, affine)
    dataset = open_dataset(root)
    for axes, signs in orientations():
        image = nib.Nifti1Image(mask, affine)
        target = np.array([[axis, sign] for axis, sign in zip(axes, signs, strict=True)])
        nib.save(image.as_reoriented(target), root / "labelsTr" / "case_a.nii.gz")
        (scan,), label = read_case(dataset.case("case_a"), dataset.label_map)
        assert label is not None
        np.testing.assert_array_equal(label.array, mask)
        np.testing.assert_array_equal(label.affine, scan.affine)


def test_a_channel_stored_in_another_orientation_is_turned(nnunet_folder: Builder) -> None:
    root = nnunet_folder(("case_a",), channels=2)
    path = root / "imagesTr" / "case_a_0001.nii.gz"
    nib.save(nib.as_closest_canonical(nib.load(path)), root / "turned.nii.gz")
    (root / "turned.nii.gz").replace(path)
    dataset = open_dataset(root)
    volumes, _ = read_case(dataset.case("case_a"), dataset.label_map)
    np.testing.assert_array_equal(volumes[0].array, volumes[1].array)


def test_a_mask_mirrored_in_the_world_is_refused(nnunet_folder: Builder) -> None:
    root = nnunet_folder(("case_a",))
    write_nifti(
        root / "labelsTr" / "case_a.nii.gz", np.zeros((12, 10, 6), np.uint8), AFFINE * [[-1], [1], [1], [1]]
    )
    dataset = open_dataset(root)
    with pytest.raises(DataError, match="in whatever order and direction the axes are taken"):
        read_case(dataset.case("case_a"), dataset.label_map)


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_a_mask_on_either_form_of_its_scan_is_on_its_grid(nnunet_folder: Builder, form: str) -> None:
    root = nnunet_folder(("case_a",))
    moved = AFFINE.copy()
    moved[:3, 3] += (40, -25, 15)
    image = nib.Nifti1Image(np.zeros((12, 10, 6), np.int16), AFFINE)
    image.set_qform(AFFINE, 1)
    image.set_sform(moved, 2)
    nib.save(image, root / "imagesTr" / "case_a_0000.nii.gz")
    place = moved if form == "sform" else AFFINE
    write_nifti(root / "labelsTr" / "case_a.nii.gz", np.zeros((12, 10, 6), np.uint8), place)
    dataset = open_dataset(root)
    (scan,), label = read_case(dataset.case("case_a"), dataset.label_map)
    assert label is not None
    np.testing.assert_array_equal(label.affine, scan.affine)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 9, 17, 40, 100, 200, 254])
def test_scaled_label_maps_come_back_whole(tmp_path: Path, kind: type, most: int) -> None:
    labels = np.arange(most + 1, dtype=np.float64).reshape(-1, 1, 1) * np.ones((1, 2, 2))
    image = nib.Nifti1Image(labels, np.eye(4))
    image.set_data_dtype(kind)
    nib.save(image, tmp_path / "mask.nii.gz")
    declared = {value: value for value in range(most + 1)}
    mapped = map_labels(read_volume(tmp_path / "mask.nii.gz").array, declared, "mask")
    np.testing.assert_array_equal(mapped, labels)


@pytest.mark.parametrize("value", [0.99998, 1.0000153, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearly_whole_labels_are_rounded(value: float, dtype: type) -> None:
    assert map_labels(np.array([0, value, value], dtype), {0: 0, 1: 1}, "mask").tolist() == [0, 1, 1]


@pytest.mark.parametrize("values", [[0, 0.4, 1], [0, 1.01, 2], [0, 0.99], [0, 1, np.nan], [0.3, 0.3]])
def test_interpolated_masks_are_refused(values: list[float]) -> None:
    with pytest.raises(DataError, match="labels are whole numbers: save the mask as integers"):
        map_labels(np.array(values), {0: 0, 1: 1, 2: 2}, "mask")


def test_two_values_never_meet_in_one_label_of_a_coarse_scale() -> None:
    values = np.array([0.0, 99.7, 100.2, 200.0])
    with pytest.raises(DataError, match="undeclared label"):
        map_labels(values, {0: 0, 100: 1, 200: 2}, "mask")


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int64, np.uint64, np.float64])
def test_masks_of_any_type_become_class_indices(dtype: Any) -> None:
    mapped = map_labels(np.array([0, 1, 1]).astype(dtype), {0: 0, 1: 1}, "mask")
    assert mapped.dtype == np.uint8
    assert mapped.tolist() == [0, 1, 1]


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float32])
def test_values_beyond_255_become_class_indices(dtype: type) -> None:
    mapped = map_labels(np.array([0, 205, 850], dtype), {0: 0, 205: 1, 850: 2}, "mask")
    assert mapped.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_a_black_and_white_mask_is_read_as_0_and_1(nnunet_folder: Builder, dtype: type) -> None:
    root = nnunet_folder()
    mask = np.zeros((12, 10, 6), dtype)
    mask[0, 0, :3] = 255
    write_nifti(root / "labelsTr" / "case_a.nii.gz", mask, AFFINE)
    dataset = open_dataset(root)
    _, label = read_case(dataset.case("case_a"), dataset.label_map)
    assert label is not None
    np.testing.assert_array_equal(label.array, mask == 255)
    assert label.notes == ("the mask holds 0 and 255, read as 0 and 1",)
    notices = fingerprint_dataset(dataset, ["case_a", "case_b"]).notices
    assert "1 of 2 masks hold 0 and 255, which are read as 0 and 1" in notices


@pytest.mark.parametrize(
    ("values", "label_map"),
    [
        ([0, 1, 255], {0: 0, 1: 1}),
        ([0, 255], {0: 0, 1: 1, 2: 2}),
        ([0, 128], {0: 0, 1: 1}),
        ([255], {0: 0, 1: 1}),
    ],
)
def test_other_bright_masks_are_refused_with_advice(values: list[int], label_map: dict[int, int]) -> None:
    with pytest.raises(DataError, match=r"undeclared label .*declare"):
        map_labels(np.array(values, np.uint8), label_map, "mask")


def test_255_that_is_the_ignore_label_stays_that() -> None:
    assert map_labels(np.array([0, 255], np.uint8), {0: 0, 1: 1, 255: 255}, "mask").tolist() == [0, 255]
