"""The cases of an evaluation that stand for the others are shown on their scans."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lungkit.data import write_nifti
from lungkit.errors import DataError
from lungkit.pipeline.evaluation_pages import find_images, write_evaluation_pages
from lungkit.report.evaluation import FOREGROUND, evaluate_pairs
from lungkit.report.mask_files import MaskReader, find_pairs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("imagesTr", "labelsTr", "predictions"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate("abc"):
        mask = np.zeros((12, 10, 4), np.uint8)
        mask[2:8, 2:8, 1:3] = 1
        write_nifti(
            tmp_path / "imagesTr" / f"{name}_0000.nii.gz", mask * np.int16(100) - np.int16(900), np.eye(4)
        )
        write_nifti(tmp_path / "labelsTr" / f"{name}.nii.gz", mask, np.eye(4))
        write_nifti(tmp_path / "predictions" / f"{name}.nii.gz", np.roll(mask, number, 0), np.eye(4))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "foreground": 1}, "numTraining": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))
    return tmp_path


def pages_of(root: Path, images: dict[str, Path]) -> dict[str, str]:
    pairs = find_pairs(root / "predictions", root / "labelsTr").pairs
    table = evaluate_pairs(pairs).table
    reader = MaskReader(FOREGROUND.values)
    write_evaluation_pages(root / "pages", pairs, FOREGROUND, reader, table, images)
    return {path.stem: path.read_text() for path in (root / "pages").iterdir()}


def test_scans_are_found_in_the_dataset_of_the_labels_or_where_they_are_said_to_be(root: Path) -> None:
    expected = {name: root / "imagesTr" / f"{name}_0000.nii.gz" for name in "abc"}
    assert find_images(root / "labelsTr") == expected
    assert find_images(root) == expected
    assert find_images(root / "predictions", root / "imagesTr") == expected
    with pytest.raises(DataError, match="no such folder"):
        find_images(root, root / "absent")


def test_pages_show_prediction_truth_scan_and_metrics(root: Path) -> None:
    pages = pages_of(root, find_images(root))
    assert pages.keys() == set("abc")
    for part in (
        '"name":"prediction"',
        '"name":"truth"',
        "Against the truth",
        'id="volume-image"',
        '"unit":"HU"',
    ):
        assert part in pages["c"]


def test_without_a_scan_there_are_masks_alone(root: Path) -> None:
    pages = pages_of(root, {})
    assert "not given: masks alone" in pages["a"]
    assert 'id="volume-image"' not in pages["a"]
