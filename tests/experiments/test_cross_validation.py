"""All folds in one command: every case measured out of fold, shares, the ensemble, what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lungkit.cli.train import main
from lungkit.data import write_phantom_dataset
from lungkit.errors import CheckpointError
from lungkit.experiments import runs
from lungkit.inference import Predictor
from lungkit.inference.trained_model import model_folders


def options(tmp: Path) -> list[str]:
    if not (tmp / "scans").exists():
        write_phantom_dataset(tmp / "scans", cases=4, shape=(32, 32), dims=2)
        (tmp / "scans" / "splits_final.json").unlink()
    values = {
        "epochs": 1,
        "steps_per_epoch": 1,
        "batch_size": 2,
        "model": "unet",
        "model.features": "[4, 8]",
        "data": tmp / "scans",
        "data.patch_size": "[16, 16]",
        "data.folds": 2,
        "engine.accelerator": "cpu",
        "runs": tmp / "runs",
        "data.cache": tmp / "cache",
        "name": "all",
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungkit.training.run.save_curves", lambda *args: None)
    monkeypatch.setattr("lungkit.training.finishing.draw_overlays", lambda *args, **options: None)


def test_shares_train_all_folds_and_the_last_measures_every_case_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "all"
    command = ["--fold", "all", *options(tmp_path)]
    assert main([*command, "--shard", "1/2"]) == 0
    assert not (folder / "out_of_fold.csv").exists()
    with pytest.raises(CheckpointError, match="fold-0: this fold is not trained"):
        model_folders(folder)
    assert main([*command, "--shard", "0/2"]) == 0
    with (folder / "out_of_fold.csv").open(newline="") as file:
        cases = [row["case"] for row in csv.DictReader(file)]
    assert len(cases) == len(set(cases)) == 4
    assert "nothing was chosen" in (folder / "out_of_fold.md").read_text()
    weights = [model.path for model in Predictor.from_run(folder, device="cpu").models]
    assert weights == [folder / f"fold-{fold}" / "checkpoints" / "last" for fold in range(2)]
    monkeypatch.setattr(runs.Trainer, "fit", lambda self: pytest.fail("trained again"))
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--seed", "1"]) == 2
    assert "name another with --name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fold", "all"], "name it with --name"),
        (["--fold", "all", "--name", "a", "--choose_postprocessing", "true"], "leave it out"),
        (["--shard", "0/2"], "--fold all"),
        (["--fold", "two"], "data.fold"),
    ],
)
def test_wrong_usage_ends_with_2(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--runs", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
