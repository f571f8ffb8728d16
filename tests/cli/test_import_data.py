"""lungkit-import: from DICOM folders to a dataset that lungkit-train takes."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicom_cases import change, write_ct

from lungkit.cli.import_data import main
from lungkit.cli.train import main as train
from lungkit.data import read_series, write_rtstruct


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three patients with a tumour; nobody's name is in a path."""
    for number in (1, 2, 3):
        folder = tmp_path / "src" / f"patient{number}" / "study"
        hu = np.random.default_rng(number).integers(-1000, 200, (32, 32, 6)).astype(np.int16)
        write_ct(folder / "ct", hu, series=number, edit=change(PatientID=str(number)))
        mask = np.zeros(hu.shape, np.uint8)
        mask[8:16, 8:16, 2:4] = 1
        write_rtstruct(folder / "rs.dcm", read_series(folder / "ct"), mask, {"GTVp": 1})
    return tmp_path / "src"


def test_the_dataset_can_be_trained_on(source: Path, tmp_path: Path) -> None:
    assert main(["dicom", str(source), "-o", str(tmp_path / "data"), "--roi", "GTV.*=tumour"]) == 0
    options = {
        "data": tmp_path / "data", "data.cache": tmp_path / "cache", "data.folds": 3, "data.patch_size": "[16, 16]",
        "runs": tmp_path / "runs", "name": "run", "model": "unet", "model.features": "[4, 8]", "epochs": 1,
        "steps_per_epoch": 2, "batch_size": 2, "engine.accelerator": "cpu",
    }  # fmt: skip
    assert train([f"--{name}={value}" for name, value in options.items()]) == 0
    with (tmp_path / "runs" / "run" / "validation.csv").open() as file:
        assert {row["label"] for row in csv.DictReader(file)} == {"tumour"}


def test_what_is_passed_over_is_said_and_the_exit_code_tells(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next((source / "patient2" / "study" / "ct").iterdir())
    path.write_bytes(path.read_bytes()[:200])
    report = tmp_path / "report.csv"
    assert main(["dicom", str(source), "-o", str(tmp_path / "data"), "--report", str(report)]) == 3
    shown = capsys.readouterr().err
    assert path.name in shown and "2 cases in" in shown
    with report.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows if row["case"]] == ["p001-ct1", "p002-ct1"]
    assert any(
        row["folder"].endswith("patient2/study/ct") and "may lack a slice" in row["note"] for row in rows
    )
    assert main(["dicom", str(source), "-o", str(tmp_path / "again"), "--report", str(report)]) == 2
    assert not (tmp_path / "again").exists()


def test_a_zip_from_an_archive_gives_the_same_dataset(source: Path, tmp_path: Path) -> None:
    path = shutil.make_archive(str(tmp_path / "export"), "zip", source)
    for given, name in ((path, "zipped"), (source, "folder")):
        assert main(["dicom", str(given), "-o", str(tmp_path / name), "--roi", "GTV.*=tumour"]) == 0
    found = [
        {
            file.relative_to(tmp_path / name): file.read_bytes()
            for file in (tmp_path / name / "labelsTr").iterdir()
        }
        for name in ("zipped", "folder")
    ]
    assert len(found[0]) == 3 and found[0] == found[1]
