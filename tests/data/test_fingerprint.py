"""What the fingerprint measures, and what it notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lungkit.data import Fingerprint, fingerprint_dataset, open_dataset, read_volume, write_nifti
from lungkit.errors import DataError, UsageError

AFFINE = np.diag([-0.75, -0.75, 2.5, 1.0])

Builder = Callable[..., Path]


def write_images(root: Path, *arrays: np.ndarray) -> None:
    for name, array in zip(("case_a", "case_b"), arrays, strict=True):
        write_nifti(root / "imagesTr" / f"{name}_0000.nii.gz", array, AFFINE)


def measure(root: Path, case_ids: tuple[str, ...] = ("case_a", "case_b")) -> Fingerprint:
    return fingerprint_dataset(open_dataset(root), case_ids)


def test_moments_are_those_of_all_foreground_voxels(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    found = measure(root).channels[0]
    voxels = []
    for name in ("case_a", "case_b"):
        image = read_volume(root / "imagesTr" / f"{name}_0000.nii.gz").array
        voxels.append(image[read_volume(root / "labelsTr" / f"{name}.nii.gz").array == 1])
    everything = np.concatenate(voxels).astype(np.float64)
    assert found.mean == pytest.approx(everything.mean())
    assert found.std == pytest.approx(everything.std())
    assert found.percentile_00_5 == np.sort(everything)[0]
    assert found.percentile_99_5 == pytest.approx(np.percentile(everything, 99.5), abs=3)


def test_percentiles_weigh_large_tumours_by_their_size(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    # One tumour of 200,000 voxels at 100, one of 1,000 at 0: the 0.5 percentile of all is just at 0.
    for name, shape, value in (("case_a", (100, 100, 20), 100), ("case_b", (10, 10, 10), 0)):
        write_nifti(root / "imagesTr" / f"{name}_0000.nii.gz", np.full(shape, value, np.int16), AFFINE)
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", np.ones(shape, np.uint8), AFFINE)
    found = measure(root).channels[0]
    assert found.percentile_99_5 == 100
    assert found.percentile_00_5 == 100


def test_shapes_and_spacings_are_zyx(nnunet_folder: Builder) -> None:
    found = measure(nnunet_folder())
    assert found.shapes[0] == (6, 10, 12)
    np.testing.assert_allclose(found.spacings_mm[0], (2.5, 0.75, 0.75), rtol=1e-6)


def test_only_the_named_cases_count(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    image = read_volume(root / "imagesTr" / "case_b_0000.nii.gz").array
    write_images(root, read_volume(root / "imagesTr" / "case_a_0000.nii.gz").array, image + 5000)
    assert measure(root, ("case_a",)).channels[0].maximum < 1000
    assert measure(root).channels[0].maximum > 4000


def test_foreground_is_counted(nnunet_folder: Builder) -> None:
    found = measure(nnunet_folder())
    assert found.class_voxels == (2 * (720 - 48), 2 * 48)
    assert found.foreground_fractions == (48 / 720, 48 / 720)


def test_ignored_voxels_are_neither_foreground_nor_background(nnunet_folder: Builder) -> None:
    root = nnunet_folder(labels={"background": 0, "tumour": 1, "ignore": 2})
    mask = np.zeros((12, 10, 6), np.uint8)
    mask[0, 0, 0], mask[1, :, :] = 1, 2
    write_nifti(root / "labelsTr" / "case_a.nii.gz", mask, AFFINE)
    assert measure(root, ("case_a",)).class_voxels == (720 - 60 - 1, 1)


def test_ct_is_in_hu_without_a_notice(nnunet_folder: Builder) -> None:
    found = measure(nnunet_folder())
    assert found.channels[0].units == "HU"
    assert found.notices == ()


def test_8_bit_data_are_noticed(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 6)).astype(np.uint8)
    write_images(root, image, image)
    found = measure(root)
    assert found.channels[0].units == "8-bit"
    assert found.notices == (
        "8-bit data, not HU: window presets do not apply; percentiles from the foreground are used",
    )


def test_missing_rescale_intercept_is_noticed(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    image = np.random.default_rng(0).integers(0, 3000, (12, 10, 6)).astype(np.int16)
    write_images(root, image, image)
    found = measure(root)
    assert found.channels[0].units == "arbitrary"
    assert "without its intercept of -1024" in found.notices[0]


def test_scaled_floats_are_arbitrary(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    image = np.random.default_rng(0).random((12, 10, 6)).astype(np.float32)
    write_images(root, image, image)
    assert measure(root).channels[0].units == "arbitrary"


def test_case_without_air_among_ct_is_named(nnunet_folder: Builder) -> None:
    root = nnunet_folder(names=("case_a", "case_b", "case_c"))
    write_nifti(root / "imagesTr" / "case_b_0000.nii.gz", np.full((12, 10, 6), 40, np.int16), AFFINE)
    found = measure(root, ("case_a", "case_b", "case_c"))
    assert found.notices == ("1 cases hold no air and may not be in HU: case_b",)


def test_case_without_foreground_is_named(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    write_nifti(root / "labelsTr" / "case_b.nii.gz", np.zeros((12, 10, 6), np.uint8), AFFINE)
    assert measure(root).notices == ("1 of 2 cases hold no foreground: case_b",)


def test_no_foreground_at_all_falls_back_on_all_voxels(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    for name in ("case_a", "case_b"):
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", np.zeros((12, 10, 6), np.uint8), AFFINE)
    found = measure(root)
    assert "no case holds any foreground" in found.notices[0]
    assert -900 < found.channels[0].mean < -600


def test_spacing_of_1_mm_is_noticed_as_unknown(nnunet_folder: Builder) -> None:
    root = nnunet_folder(names=("case_a",))
    image, mask = np.full((4, 4, 1), -900, np.int16), np.ones((4, 4, 1), np.uint8)
    write_nifti(root / "imagesTr" / "case_a_0000.nii.gz", image, np.eye(4))
    write_nifti(root / "labelsTr" / "case_a.nii.gz", mask, np.eye(4))
    notices = measure(root, ("case_a",)).notices
    assert "every spacing is exactly 1 mm: probably unknown, so lengths in mm mean little" in notices
    assert "1 of 1 cases are a single slice" in notices


def test_damaged_file_stops_it(nnunet_folder: Builder) -> None:
    root = nnunet_folder()
    path = root / "imagesTr" / "case_b_0000.nii.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="case_b_0000"):
        measure(root)


def test_no_case_is_a_usage_error(nnunet_folder: Builder) -> None:
    with pytest.raises(UsageError, match="no case to take a fingerprint of"):
        measure(nnunet_folder(), ())


def test_progress_counts_every_case(nnunet_folder: Builder) -> None:
    calls: list[tuple[int, int]] = []
    dataset = open_dataset(nnunet_folder())
    fingerprint_dataset(
        dataset, ["case_a", "case_b"], progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(1, 2), (2, 2)]


def test_survives_json(nnunet_folder: Builder) -> None:
    found = measure(nnunet_folder())
    assert Fingerprint.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_broken_json_is_a_data_error(nnunet_folder: Builder) -> None:
    content = measure(nnunet_folder()).to_dict()
    del content["channels"]
    with pytest.raises(DataError, match="measure it again"):
        Fingerprint.from_dict(content)


def test_summary_tells_size_spacing_and_units(nnunet_folder: Builder) -> None:
    text = measure(nnunet_folder()).summary()
    assert "2 cases" in text
    assert "median 6 x 10 x 12" in text
    assert "2.5 x 0.75 x 0.75 mm" in text
    assert "HU, int16" in text
