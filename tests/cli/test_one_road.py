"""The numbers that training and comparing report are those of predicting and measuring the files by command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from lungkit.cli import compare, evaluate, predict, train
from lungkit.data import write_nifti

# Spacings (z, y, x) in mm; all are resampled. The orientation of the second validation case is none of the usual ones.
GRIDS = {
    "val_a": ((16, 36, 34), (2.0, 0.8, 0.8), "RAS"),
    "val_b": ((12, 32, 40), (3.0, 1.1, 1.0), "PIR"),
    "train_a": ((14, 32, 32), (2.5, 1.0, 1.0), "LPS"),
    "train_b": ((18, 38, 34), (1.5, 0.7, 0.7), "LAS"),
}
TINY = [
    "--data.spacing_mm", "2.2", "0.9", "0.9", "--data.patch_size", "8", "16", "16", "--model.features", "4", "8",
    "--epochs", "2", "--steps_per_epoch", "6", "--batch_size", "2", "--loss.ce_weight", "0",
    "--optimiser.ema_decay", "0", "--optimiser.warmup_steps", "0", "--optimiser.learning_rate", "0.02",
    "--engine.accelerator", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four noisy scans of a ball, of different spacings and orientations; ``val`` holds the validation images."""
    root = tmp_path_factory.mktemp("mixed")
    for folder in ("imagesTr", "labelsTr", "val"):
        (root / folder).mkdir()
    for seed, (name, (shape, spacing_mm, codes)) in enumerate(GRIDS.items()):
        random = np.random.default_rng(seed)
        grid = np.meshgrid(
            *(np.arange(n) * mm for n, mm in zip(shape, spacing_mm, strict=True)), indexing="ij"
        )
        square = sum((axis - axis.max() * random.uniform(0.4, 0.6)) ** 2 for axis in grid)
        label = (square < 7.0**2).astype(np.uint8)
        image = (random.normal(-800, 150, shape) + 300.0 * label).astype(np.int16)
        ras = np.diag([*spacing_mm[::-1], 1.0])
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
        )
        affine = ras @ nibabel.orientations.inv_ornt_aff(turn, shape[::-1])
        for folder, end, array in (("imagesTr", "_0000.nii.gz", image), ("labelsTr", ".nii.gz", label)):
            turned = nibabel.orientations.apply_orientation(array.transpose(2, 1, 0), turn)
            write_nifti(root / folder / f"{name}{end}", np.ascontiguousarray(turned), affine)
        if name.startswith("val"):
            shutil.copy(root / "imagesTr" / f"{name}_0000.nii.gz", root / "val")
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": len(GRIDS),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    names = [[name for name in GRIDS if name.startswith(kind)] for kind in ("train", "val")]
    (root / "splits_final.json").write_text(json.dumps([{"train": names[0], "val": names[1]}]))
    return root


@pytest.fixture(autouse=True)
def fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any CPU counts as one that computes with bf16, so that what was trained in it is predicted in it."""
    monkeypatch.setattr("lungkit.inference.precision.cpu_computes_bf16", lambda: True)


def trained(mixed: Path, folder: Path, name: str, *options: str) -> Path:
    fixed = [
        "--data",
        str(mixed),
        "--data.cache",
        str(folder / "cache"),
        "--runs",
        str(folder),
        "--name",
        name,
    ]
    assert train.main([*fixed, *TINY, *options]) == 0
    return folder / name


def predicted_and_measured(mixed: Path, model: Path, folder: Path) -> bytes:
    """``metrics.csv`` of lungkit-evaluate for what lungkit-predict makes of the validation scans."""
    masks = folder / "masks"
    assert predict.main(["--model", str(model), "-i", str(mixed / "val"), "-o", str(masks)]) == 0
    assert evaluate.main([str(masks), str(mixed), "-o", str(folder / "measured"), "--common-only"]) == 0
    return (folder / "measured" / "metrics.csv").read_bytes()


@pytest.mark.parametrize("options", [(), ("--choose_postprocessing", "true")], ids=["plain", "chosen"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_reports_what_its_model_gives(
    mixed: Path, tmp_path: Path, precision: str, options: tuple[str, ...]
) -> None:
    run = trained(mixed, tmp_path, "run", "--engine.precision", precision, *options)
    manifest = json.loads((run / "checkpoints" / "best" / "manifest.json").read_text())
    assert manifest["preprocessing"]["target_spacing_mm"] == [2.2, 0.9, 0.9]
    assert manifest["precision"] == precision
    assert predicted_and_measured(mixed, run, tmp_path) == (run / "validation.csv").read_bytes()
    records = [json.loads(path.read_text()) for path in (tmp_path / "masks" / "reports").iterdir()]
    assert {record["precision"] for record in records} == {precision}
    assert any(lesion for record in records for lesion in record["classes"]["tumour"]["lesions"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_comparing_reports_what_the_last_weights_give(mixed: Path, tmp_path: Path, precision: str) -> None:
    runs = [
        trained(mixed, tmp_path, model, "--model", model, "--engine.precision", precision)
        for model in ("unet", "attention-unet")
    ]
    assert compare.main(["-o", str(tmp_path / "out"), "--runs", *map(str, runs)]) == 0
    for run in runs:
        found = predicted_and_measured(mixed, run / "checkpoints" / "last", tmp_path / f"{run.name}-last")
        assert found == (tmp_path / "out" / "cases" / f"{run.name}.csv").read_bytes()
