"""The final table is that of the best weights on the scans themselves, by whichever process predicted them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lungkit.data import CachedCase, read_volume
from lungkit.inference import Predictor
from lungkit.metrics import MetricOptions
from lungkit.training import TrainConfig, Trainer, finishing

MakeDataset = Callable[..., Path]
Tiny = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungkit.training.run.save_curves", lambda *args: None)
    monkeypatch.setattr(finishing, "draw_overlays", lambda *args, **options: None)


@pytest.fixture
def resampled(make_dataset: MakeDataset, tiny: Tiny) -> TrainConfig:
    """One epoch on scans of 0.5 mm, at 1 mm; the first two cases are held out."""
    root = make_dataset(shape=(16, 24, 24), spacings_mm=((2.0, 0.5, 0.5),), validation=2)
    return tiny(
        data__root=str(root),
        data__patch_size=(8, 8, 8),
        data__spacing_mm=(2.0, 1.0, 1.0),
        epochs=1,
        steps_per_epoch=1,
    )


def test_every_table_says_how_it_was_measured(resampled: TrainConfig) -> None:
    result = Trainer(resampled).fit()
    for name in ("validation.txt", "validation.md", "train.log"):
        text = (result.run_folder / name).read_text()
        assert finishing.GRID_NOTE in text and "HD95 directed (mm): 95th percentile" in text, name
    content = json.loads((result.run_folder / "validation.json").read_text())
    assert content["grid"] == finishing.GRID_NOTE and content["epoch"] == 1
    assert content["definitions"] == MetricOptions().definitions()
    assert result.table.metrics == tuple(MetricOptions().definitions())


def test_the_truth_is_the_mask_of_the_file_not_of_the_cache(
    resampled: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that repeats the resampled truth is perfect in metrics.csv, and the final table does not ask it."""
    image_float, asked = CachedCase.image_float, []

    def watched(case: CachedCase) -> np.ndarray:
        asked.append(case)
        return image_float(case)

    monkeypatch.setattr(CachedCase, "image_float", watched)
    monkeypatch.setattr(
        "lungkit.training.validation.predict_label",
        lambda *_, **__: torch.from_numpy(np.array(asked[-1].label)),
    )
    result = Trainer(resampled).fit()
    assert result.best_dice == 1.0 and result.dice < 1.0
    for row in result.table.rows:
        own = read_volume(Path(str(resampled.data.root)) / "labelsTr" / f"{row.case_id}.nii.gz")
        assert row.values["tp"] + row.values["fn"] == (own.array == 1).sum()
        assert row.values["volume_true_ml"] == pytest.approx((own.array == 1).sum() * 0.0005)


def test_the_best_weights_are_measured(resampled: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    measure = finishing.measure_scans

    def watched(predictor: Predictor, *args: Any, **options: Any) -> Any:
        seen.append((predictor.models[0].path, predictor.device.type, predictor.models[0].precision))
        return measure(predictor, *args, **options)

    monkeypatch.setattr(finishing, "measure_scans", watched)
    result = Trainer(resampled).fit()
    assert seen == [(result.run_folder / "checkpoints" / "best", "cpu", "fp32")]


def test_shares_of_several_processes_make_one_table_in_the_order_of_the_fold(
    resampled: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer(resampled).fit()

    def reversed_shares(rows: list[Any], world_size: int) -> list[list[Any]]:
        return [[row] for row in reversed(rows)]

    monkeypatch.setattr(finishing, "gather_objects", reversed_shares)
    again = Trainer.from_run(whole.run_folder).fit()
    assert again.table.case_ids == ("case_0", "case_1")
    assert again.table.rows == whole.table.rows


@pytest.mark.parametrize("kept", [False, True])
def test_masks_of_the_validation_cases_are_kept_on_request(resampled: TrainConfig, kept: bool) -> None:
    result = Trainer(replace(resampled, save_validation=kept)).fit()
    folder = result.run_folder / "validation"
    assert folder.is_dir() == kept
    if not kept:
        return
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{case_id}.nii.gz" for case_id in result.table.case_ids
    )
    for case_id in result.table.case_ids:
        scan = next((Path(resampled.data.root) / "imagesTr").glob(f"{case_id}_0000*"))
        predicted = Predictor.from_run(result.run_folder)(scan)
        assert np.array_equal(read_volume(folder / f"{case_id}.nii.gz").array, predicted.mask)
