"""Files measured beside what several readers say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from lungkit.cli.evaluate import main
from lungkit.data import write_nifti
from lungkit.data.readers import ReaderCodes
from lungkit.report.readers import ReaderMeasurements, dataset_of_readers

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two cases read by three readers, and predictions that are the voxels of one vote or more."""
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "tumour": 1}, "readers": 3}
    for folder in ("imagesTr", "labelsTr", "votesTr", "predictions/probabilities"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for case in range(2):
        votes = np.random.default_rng(case).integers(0, 4, (6, 5, 4)).astype(np.uint8)
        files = {
            f"imagesTr/case_{case}_0000": votes.astype(np.int16),
            f"labelsTr/case_{case}": (votes >= 2).astype(np.uint8),
            f"votesTr/case_{case}": votes,
            f"predictions/case_{case}": (votes >= 1).astype(np.uint8),
            f"predictions/probabilities/case_{case}_tumour": (votes / 3).astype(np.float32),
        }
        for name, array in files.items():
            write_nifti(tmp_path / f"{name}.nii.gz", array, AFFINE)
    return tmp_path


def test_evaluation_shows_every_level_with_the_readers_beside_it(dataset, capsys):
    out = dataset / "out"
    assert main([str(dataset / "predictions"), str(dataset), "-o", str(out), "--metrics", "overlap"]) == 0
    with (out / "readers.csv").open(newline="") as file:
        rows = {(row["case"], row["label"]): row for row in csv.DictReader(file)}
    assert float(rows["case_0", "tumour, 1 of 3 or more"]["dice"]) == 1
    assert 0 < float(rows["case_0", "tumour, labels"]["readers_dice"]) < 1
    assert {label for _, label in rows} == {
        "tumour, labels",
        "tumour, 1 of 3 or more",
        "tumour, 2 of 3 or more",
        "tumour, 3 of 3",
    }
    assert "Readers' own Dice, tumour:" in (out / "metrics.md").read_text()
    assert "Readers' own Dice, tumour:" in capsys.readouterr().out


def test_probabilities_that_are_the_share_of_readers_are_calibrated(dataset):
    out = dataset / "out"
    main([str(dataset / "predictions"), str(dataset), "-o", str(out), "--metrics", "overlap"])
    calibration = json.loads((out / "calibration.json").read_text())["classes"]["tumour"]
    assert calibration["all"]["ece"] == pytest.approx(0, abs=1e-6)
    assert calibration["all"]["voxels"] == 240 > calibration["near"]["voxels"]
    assert (out / "reliability.png").stat().st_size > 1000


def test_an_unknown_number_of_readers_is_said_and_given(dataset, caplog):
    content = json.loads((dataset / "dataset.json").read_text())
    del content["readers"]
    (dataset / "dataset.json").write_text(json.dumps(content))
    command = [str(dataset / "predictions"), str(dataset), "--metrics", "overlap", "-o"]
    assert main([*command, str(dataset / "without")]) == 0
    assert "give --readers N" in caplog.text and not (dataset / "without" / "readers.csv").exists()
    assert main([*command, str(dataset / "with"), "--readers", "4"]) == 0
    assert json.loads((dataset / "with" / "readers.json").read_text())["readers"] == 4


def test_readers_of_labels_that_have_one_are_refused(dataset, capsys, monkeypatch):
    monkeypatch.chdir(dataset)
    labels = dataset / "predictions" / "probabilities"
    assert main([str(labels), str(labels), "--readers", "3"]) == 2
    assert not (dataset / "evaluation").exists()
    assert "has labels of one reader" in capsys.readouterr().err


def test_a_folder_of_labels_finds_its_dataset(dataset):
    assert dataset_of_readers(dataset / "labelsTr") is not None
    assert dataset_of_readers(dataset / "predictions" / "case_0.nii.gz") is None


def test_parts_of_several_processes_are_one_table(dataset):
    parts = [ReaderMeasurements(ReaderCodes(3, 2), {"background": 0, "tumour": 1}) for _ in range(3)]
    votes = np.random.default_rng(0).integers(0, 4, (2, 4, 4, 4)).astype(np.uint8)
    for index, part in ((0, 0), (1, 1), (0, 2), (1, 2)):
        says = votes[index]
        parts[part].add(f"case_{index}", says > 0, says, (says > 1).astype(np.uint8), {"tumour": says / 3})
    parts[0].merge(parts[1])
    assert parts[0].table.rows == parts[2].table.rows
    assert parts[0].ceiling_notes() == parts[2].ceiling_notes()
    assert parts[0].calibration_notes() == parts[2].calibration_notes()
