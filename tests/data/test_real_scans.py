"""The data folder on real CT."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lungkit.data import (
    CaseCache,
    fingerprint_dataset,
    make_or_load_splits,
    open_dataset,
    plan_preprocessing,
    preprocess_image,
    read_case,
    read_volume,
)
from lungkit.data.geometry import orient
from lungkit.data.preprocessing import preprocess_label
from lungkit.data.resampling import resample_nearest
from lungkit.errors import DataError


def test_nsclc_scans_are_in_hu_and_equal_to_nibabel(real_data: Path) -> None:
    dataset = open_dataset(real_data / "nsclc_ct")
    for case in dataset.cases[:2]:
        (volume,), _ = read_case(case, dataset.label_map)
        image: Any = nib.load(case.images[0])
        assert volume.array.dtype == np.int16
        np.testing.assert_array_equal(volume.array, np.asanyarray(image.dataobj))
        np.testing.assert_allclose(volume.affine, image.affine)


def test_fingerprints_tell_hu_from_8_bit(real_data: Path) -> None:
    nsclc, covid = open_dataset(real_data / "nsclc_ct"), open_dataset(real_data / "covid100")
    assert fingerprint_dataset(nsclc, ["nsclc_pat2"]).channels[0].units == "HU"
    found = fingerprint_dataset(covid, [case.case_id for case in covid.cases[:3]])
    assert found.channels[0].units == "8-bit"
    assert "every spacing is exactly 1 mm: probably unknown, so lengths in mm mean little" in found.notices


def test_lidc_splits_keep_patients_whole(real_data: Path) -> None:
    dataset = open_dataset(real_data / "lidc_nodules")
    assert len(dataset.cases) == 928
    splits = make_or_load_splits(dataset, patient_pattern=r"^(LIDC-IDRI-\d+)_")
    assert len(splits) == 5
    for split in splits:
        assert not {name[:14] for name in split.train} & {name[:14] for name in split.val}


def test_tumour_survives_the_way_to_the_network_and_back(real_data: Path) -> None:
    dataset = open_dataset(real_data / "nsclc_ct")
    (volume,), label = read_case(dataset.case("nsclc_pat2"), dataset.label_map)
    assert label is not None
    plan = plan_preprocessing(fingerprint_dataset(dataset, ["nsclc_pat2"]), spacing_mm=(1.5, 0.8, 0.8))
    image = preprocess_image(volume, plan)
    geometry, restored = image.geometry, np.zeros_like(label.array)
    seen = preprocess_label(label, geometry)
    orient(restored, geometry)[...] = resample_nearest(seen, geometry.oriented_shape)
    overlap = 2 * np.sum(restored * label.array) / (restored.sum() + label.array.sum())
    assert restored.shape == label.array.shape
    assert overlap > 0.97


def test_foreground_of_the_cache_is_tumour_in_the_scan(real_data: Path, tmp_path: Path) -> None:
    dataset = open_dataset(real_data / "nsclc_ct")
    plan = plan_preprocessing(fingerprint_dataset(dataset, ["nsclc_pat3"]), spacing_mm="native")
    case = CaseCache(tmp_path, dataset, plan).prepare("nsclc_pat3")
    (volume,), label = read_case(dataset.case("nsclc_pat3"), dataset.label_map)
    assert label is not None
    assert sum(case.class_voxels[1:]) == np.count_nonzero(label.array)
    z, y, x = case.foreground[0]
    # The scan is stored as LPS: x and y run against R and A.
    stored = volume.array[volume.array.shape[0] - 1 - x, volume.array.shape[1] - 1 - y, z]
    (channel,) = plan.channels
    found = (case.image[0, z, y, x] * case.slope + case.intercept) * channel.std + channel.mean
    assert found == pytest.approx(np.clip(stored, *channel.window), abs=0.02)


def test_one_flipped_byte_in_a_real_scan_is_refused(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "lidc_nodules" / "imagesTr" / "LIDC-IDRI-0006_n03_0000.nii.gz"
    content = source.read_bytes()
    expected = gzip.decompress(content)
    path = tmp_path / "scan.nii.gz"
    read_silently_wrong = 0
    for position in np.random.default_rng(0).choice(np.arange(20, len(content) - 9), 60, replace=False):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            voxels = read_volume(path).array
        except DataError:
            continue
        read_silently_wrong += voxels.tobytes(order="F") != expected[352:]
    assert read_silently_wrong == 0
