"""Pages of predictions that are there already."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lungkit.data import write_nifti
from lungkit.errors import DataError
from lungkit.pipeline.prediction_pages import write_prediction_pages


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("scans", "masks/reports", "masks/probabilities"):
        (tmp_path / name).mkdir(parents=True)
    write_nifti(tmp_path / "scans" / "a.nii.gz", np.full((8, 8, 4), -800, np.int16), np.eye(4))
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[2:4, 2:4, 1] = 7
    write_nifti(tmp_path / "masks" / "a.nii.gz", mask, np.eye(4))
    return tmp_path


def test_classes_and_probabilities_are_those_of_the_prediction(folder: Path) -> None:
    report = {"labels": {"background": 0, "tumour": 7}, "models": [{"name": "unet"}]}
    (folder / "masks" / "reports" / "a.json").write_text(json.dumps(report))
    write_nifti(
        folder / "masks" / "probabilities" / "a_tumour.nii.gz", np.full((8, 8, 4), 0.5, np.float32), np.eye(4)
    )
    assert write_prediction_pages(folder / "masks", folder / "scans") == {}
    text = (folder / "masks" / "pages" / "a.html").read_text()
    assert '"name":"tumour"' in text
    assert "probability of tumour" in text
    assert ">0.50</td>" in text  # confidence
    assert "unet" in text


def test_a_mask_without_its_scan_is_named(folder: Path) -> None:
    write_nifti(folder / "masks" / "b.nii.gz", np.zeros((8, 8, 4), np.uint8), np.eye(4))
    assert write_prediction_pages(folder / "masks", folder / "scans").keys() == {"b"}


def test_folders_of_other_names_are_refused(folder: Path) -> None:
    (folder / "scans" / "a.nii.gz").rename(folder / "scans" / "z.nii.gz")
    with pytest.raises(DataError, match="no name in common: masks a; scans z"):
        write_prediction_pages(folder / "masks", folder / "scans")
