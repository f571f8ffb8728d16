"""A run as a MONAI bundle: MONAI's own runner gives lungkit's masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from model_cases import random_network, save_model

import lungkit
from lungkit.cli.export import main
from lungkit.data import Volume, read_volume
from lungkit.data.volume import write_nifti


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Of a run of two folds, beside a folder of two scans."""
    for fold in (0, 1):
        save_model(tmp_path / f"run/fold_{fold}/checkpoints/best", random_network(seed=fold))
    (tmp_path / "run" / "folds.json").write_text(
        json.dumps({"folds": ["fold_0", "fold_1"], "checkpoint": "best"})
    )
    (tmp_path / "scans").mkdir()
    for name in "ab":
        hu = np.random.default_rng(ord(name)).normal(0, 400, (20, 18, 9)).astype(np.int16)
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", hu, np.diag([-1.0, -1.0, 2.0, 1.0]))
    assert main(["--model", str(tmp_path / "run"), "--format", "monai", "-o", str(tmp_path / "bundle")]) == 0
    return tmp_path / "bundle"


def test_monai_runs_it_and_the_masks_are_lungkits(bundle: Path, tmp_path: Path) -> None:
    monai_bundle = pytest.importorskip("monai.bundle")
    monai_bundle.run(
        bundle_root=str(bundle),
        config_file=str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        dataset_dir=str(tmp_path / "scans"),
        output_dir=str(tmp_path / "masks"),
        device="cpu",
    )
    predictor = lungkit.Predictor.from_run(tmp_path / "run", device="cpu")
    for name in "ab":
        expected = predictor(tmp_path / "scans" / f"{name}.nii.gz").mask
        found: Volume = read_volume(tmp_path / "masks" / f"{name}.nii.gz")
        assert (found.array == expected).all() and 0 < expected.mean() < 1


def test_monai_finds_the_network_to_take_and_give_what_the_metadata_say(bundle: Path) -> None:
    monai_bundle = pytest.importorskip("monai.bundle")
    monai_bundle.verify_net_in_out(
        net_id="network_def",
        config_file=str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        device="cpu",
    )


def test_no_path_of_this_machine_is_in_it(bundle: Path, tmp_path: Path) -> None:
    for path in bundle.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path


def test_a_folder_that_exists_is_kept(bundle: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tmp_path / "run"), "--format", "monai"]
    assert main([*arguments, "-o", str(bundle)]) == 2
    assert main([*arguments, "-o", str(tmp_path / "new"), "--native-gate"]) == 2
    assert not (tmp_path / "new").exists()
