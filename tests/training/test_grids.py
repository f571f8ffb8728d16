"""The final table and pictures are on the scans' own grid, resampled or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lungkit.data import (
    CachedCase,
    CaseCache,
    Dataset,
    Preprocessing,
    fingerprint_dataset,
    open_dataset,
    plan_preprocessing,
    read_volume,
    write_nifti,
)
from lungkit.training import TrainConfig, Trainer
from lungkit.training.grids import CacheGrid, ScanGrid, grid_of_scans

MakeDataset = Callable[..., Path]


def prepared(
    root: Path, cache: Path, spacing_mm: tuple[float, float, float]
) -> tuple[Dataset, Preprocessing, CachedCase]:
    dataset = open_dataset(root)
    case_id = dataset.cases[0].case_id
    preprocessing = plan_preprocessing(fingerprint_dataset(dataset, [case_id]), spacing_mm=spacing_mm)
    return dataset, preprocessing, CaseCache(cache, dataset, preprocessing).prepare(case_id)


def test_without_resampling_no_file_is_read_again(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset, preprocessing, case = prepared(make_dataset(cases=1), tmp_path / "cache", (1.0, 1.0, 1.0))
    grid = grid_of_scans(dataset, replace(preprocessing, target_spacing_mm=None), max_voxels=10**6)
    assert isinstance(grid, CacheGrid)
    prediction, truth = grid.labels(case, np.zeros(case.shape, np.uint8))
    assert prediction.shape == truth.shape == case.shape


def test_the_truth_is_the_mask_of_the_file(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset(cases=1, shape=(8, 24, 24), spacings_mm=((2.0, 0.5, 0.5),))
    dataset, preprocessing, case = prepared(root, tmp_path / "cache", (2.0, 1.0, 1.0))
    assert case.shape == (8, 12, 12)
    grid = ScanGrid(dataset, preprocessing, max_voxels=10**6)
    prediction, truth = grid.labels(case, np.asarray(case.label))
    assert prediction.shape == truth.shape == (8, 24, 24)
    own = read_volume(dataset.cases[0].label).array  # type: ignore[arg-type]
    assert sorted((int((truth == 1).sum()), int((truth == 0).sum()))) == sorted(
        np.bincount(own.astype(int).ravel())
    )
    # The mask went down to half the resolution and back: its outline is off, its middle is not.
    dice = 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
    assert 0.8 < dice < 1


def test_both_are_in_canonical_orientation(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset(cases=1, shape=(4, 16, 16))
    mask = root / "labelsTr" / "case_0.nii.gz"
    array = np.zeros((16, 16, 4), np.uint8)
    array[2:6, 10:12, 1] = 1
    write_nifti(mask, array, read_volume(mask).affine)  # x runs to the left, y to the front: both are flipped
    dataset, preprocessing, case = prepared(root, tmp_path / "cache", (1.0, 0.5, 0.5))
    prediction, truth = ScanGrid(dataset, preprocessing, max_voxels=10**6).labels(
        case, np.asarray(case.label)
    )
    expected = array[::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(truth, expected)
    np.testing.assert_array_equal(prediction, expected)


def test_the_image_is_the_scan_normalised(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset(cases=1, shape=(8, 24, 24), spacings_mm=((2.0, 0.5, 0.5),))
    dataset, preprocessing, case = prepared(root, tmp_path / "cache", (2.0, 1.0, 1.0))
    image, spacing_mm = ScanGrid(dataset, preprocessing, max_voxels=10**6).image(case)
    assert image.shape == (1, 8, 24, 24)
    assert spacing_mm == pytest.approx((2.0, 0.5, 0.5))
    hu = read_volume(dataset.cases[0].images[0]).array[::-1, ::-1].transpose(2, 1, 0)
    (channel,) = preprocessing.channels
    expected = (np.clip(hu, *channel.window) - channel.mean) / channel.std
    np.testing.assert_allclose(image[0], expected, rtol=1e-4, atol=1e-4)


def test_the_final_table_says_on_which_grid_it_is(
    make_dataset: MakeDataset, tiny: Callable[..., TrainConfig]
) -> None:
    spacings = ((2.0, 0.5, 0.5), (2.0, 0.8, 0.8), (2.0, 0.8, 0.8), (2.0, 1.2, 1.2))
    root = make_dataset(shape=(16, 24, 24), spacings_mm=spacings, validation=1)
    config = tiny(
        data__root=str(root),
        data__patch_size=(8, 16, 16),
        epochs=1,
        optimiser__ema_decay=0.0,
        steps_per_epoch=1,
    )
    result = Trainer(config).fit()
    for name in ("validation.txt", "validation.md", "train.log"):
        assert "brought back from 2 x 0.8 x 0.8 mm" in (result.run_folder / name).read_text(), name
    content = json.loads((result.run_folder / "validation.json").read_text())
    assert "own grid" in content["grid"]
    assert list((result.run_folder / "overlays").glob("*.png"))


def test_the_final_table_is_measured_on_the_masks_themselves(
    make_dataset: MakeDataset, tiny: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that repeats the resampled truth is perfect on the grid of training, and not on the scan's."""
    root = make_dataset(shape=(16, 24, 24), spacings_mm=((2.0, 0.5, 0.5),), validation=1)
    monkeypatch.setattr(
        "lungkit.training.validation.predict_case", lambda network, case, *_, **__: np.asarray(case.label)
    )
    config = tiny(
        data__root=str(root),
        data__patch_size=(8, 8, 8),
        data__spacing_mm=(2.0, 1.0, 1.0),
        epochs=1,
        steps_per_epoch=1,
    )
    result = Trainer(config).fit()
    assert result.best_dice == 1.0
    assert 0.7 < result.dice < 1.0
