"""``lungkit-predict --at`` and ``lungkit-models``, with the model of the package."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from lungkit.cli.models import main as models
from lungkit.cli.predict import main as predict
from lungkit.data import read_volume, write_nifti

LPS = np.diag([-0.7, -0.7, 2.0, 1.0])
CENTRE = (90, 80, 12)  # at 63, 56, 24 mm in LPS


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    grid = np.indices((180, 160, 24))
    array = np.random.default_rng(0).normal(-800, 20, grid.shape[1:])
    array[sum((grid[i] - CENTRE[i]) ** 2 for i in range(3)) <= 81] += 850
    write_nifti(path, array.astype(np.int16), LPS)
    return path


def run(scan, output, *options):
    return predict(["-i", str(scan), "-o", str(output), "--device", "cpu", "--no-preview", *options])


def test_mask_measures_and_a_line_for_a_point_in_each_system(scan, tmp_path, capsys):
    assert run(scan, tmp_path / "lps.nii.gz", "--at", "63,56,24") == 0
    line = capsys.readouterr().out
    assert line.startswith("point 1 (63, 56, 24 mm LPS): ") and "% solid, stability" in line
    assert run(scan, tmp_path / "ras.nii.gz", "--at", "-63,-56,24", "--coordinates", "ras") == 0
    mask = read_volume(tmp_path / "lps.nii.gz")
    assert mask.array[CENTRE] == 1 and mask.array[20, 20, 12] == 0
    assert np.array_equal(mask.array, read_volume(tmp_path / "ras.nii.gz").array)
    (row,) = csv.DictReader((tmp_path / "lps_nodules.csv").open())
    assert 0 < float(row["volume_ml"]) < 10 and float(row["mean_intensity"]) > -400
    report = json.loads((tmp_path / "lps.json").read_text())
    assert report["labels"] == {"background": 0, "nodule 1": 1}
    assert report["classes"]["nodule 1"]["volume_ml"] == float(row["volume_ml"])


def test_a_point_without_a_nodule_is_said_and_the_others_are_written(scan, tmp_path, capsys):
    points = tmp_path / "points.csv"
    points.write_text("x,y,z\n20,20,24\n63,56,24\n")
    assert run(scan, tmp_path / "out", "--points", str(points), "--no-stability") == 3
    first, second = capsys.readouterr().out.splitlines()
    assert "no nodule within 10 mm of the point: it lies in lung" in first and " ml, " in second
    assert run(scan, tmp_path / "again", "--points", str(points), "--no-stability", "--json") == 3
    assert [row["found"] for row in json.loads(capsys.readouterr().out)] == [False, True]
    assert set(np.unique(read_volume(tmp_path / "out" / "ct.nii.gz").array)) == {0, 2}
    rows = list(csv.DictReader((tmp_path / "out" / "nodules" / "ct.csv").open()))
    assert [row["found"] for row in rows] == ["False", "True"]


def test_no_nodule_at_all_writes_nothing(scan, tmp_path):
    assert run(scan, tmp_path / "mask.nii.gz", "--at", "20,20,24") == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--at", "900,0,0"], "lies outside of the scan"),
        (["--at", "1,2"], "expected X,Y,Z"),
        (["--box", "1,2,3"], "expected X1,Y1,Z1,X2,Y2,Z2"),
        (["--at", "63,56,24", "--model", "lidc"], "no model of that name; known are lidc-nodules"),
        (["--at", "63,56,24", "--probabilities"], "--probabilities does not go with --at"),
        (["--at", "63,56,24", "--attention"], "--attention does not go with --at"),
        (["--at", "63,56,24", "--shard", "0/2"], "--shard does not go with --at"),
    ],
)
def test_points_and_models_that_cannot_be_used(scan, tmp_path, capsys, options, message):
    assert run(scan, tmp_path / "mask.nii.gz", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_model_of_the_package_is_taken_whatever_the_current_folder_holds(scan, tmp_path, monkeypatch):
    (tmp_path / "lidc-nodules").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(scan, tmp_path / "mask.nii.gz", "--at", "63,56,24", "--no-stability") == 0


def test_a_mask_that_is_there_is_not_replaced_unasked(scan, tmp_path, capsys):
    (tmp_path / "mask_nodules.csv").write_text("mine")
    assert run(scan, tmp_path / "mask.nii.gz", "--at", "63,56,24") == 2
    assert "mask_nodules.csv exists" in capsys.readouterr().err
    assert (tmp_path / "mask_nodules.csv").read_text() == "mine"


def test_points_speak_of_one_scan(scan, tmp_path, capsys):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.nii.gz", "b.nii.gz"):
        (folder / name).write_bytes(scan.read_bytes())
    assert run(folder, tmp_path / "out", "--at", "63,56,24") == 2
    assert "holds 2 scans" in capsys.readouterr().err


def test_without_points_a_model_must_be_named(scan, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(scan, tmp_path / "mask.nii.gz")
    assert stopped.value.code == 2 and "--model is required" in capsys.readouterr().err


def test_the_models_that_are_known_and_the_card_of_one(capsys):
    assert models(["list"]) == 0
    assert capsys.readouterr().out.startswith("lidc-nodules: ")
    assert models(["show", "lidc-nodules"]) == 0
    shown = capsys.readouterr().out
    assert "CC BY 3.0" in shown and "sha256" in shown
    assert models(["show", "other"]) == 2
    assert "known are lidc-nodules" in capsys.readouterr().err
