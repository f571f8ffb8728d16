"""Checkpoints as models: self-contained, verified, never executed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import HU, random_network, save_model, threshold_network
from safetensors.torch import save_file

from lungkit.checkpoint import _digest_of, sha256_of
from lungkit.data import Volume
from lungkit.errors import CheckpointError
from lungkit.inference import TrainedModel


def reseal(folder: Path, **changes) -> None:
    """Change the manifest and make its checksums right again, as a checkpoint of another program might have them."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    manifest["sha256"]["model.safetensors"] = sha256_of(folder / "model.safetensors")
    manifest["sha256"]["manifest.json"] = _digest_of(manifest)
    path.write_text(json.dumps(manifest))


def test_a_checkpoint_alone_is_enough(tmp_path):
    network = random_network()
    model = TrainedModel.load(
        save_model(tmp_path / "model", network, label_values={"b": 0, "lung": 2, "gtv": 7})
    )
    assert model.labels == {"b": 0, "lung": 2, "gtv": 7} and model.dims == 3 and model.has_attention
    assert model.preprocessing == HU
    image = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(model.network(image), network.eval()(image))


def test_a_run_means_its_best_checkpoint_else_its_last(tmp_path):
    save_model(tmp_path / "run/checkpoints/last", threshold_network())
    assert TrainedModel.load(tmp_path / "run").path.name == "last"
    save_model(tmp_path / "run/checkpoints/best", threshold_network())
    model = TrainedModel.load(tmp_path / "run")
    assert (model.path.name, model.name) == ("best", "run")


def test_a_pickle_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (tmp_path / "model.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"model\.pth: a file.*can run code"):
        TrainedModel.load(tmp_path / "model.pth")
    folder = save_model(tmp_path / "model", threshold_network())
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    (folder / "trainer.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        TrainedModel.load(folder)
    reseal(folder)
    with pytest.raises(CheckpointError, match="not a usable checkpoint"):
        TrainedModel.load(folder)
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_network_are_refused(tmp_path):
    folder = save_model(tmp_path / "model", random_network())
    save_file(threshold_network().state_dict(), folder / "model.safetensors")
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"weights of another network than manifest\.json describes"):
        TrainedModel.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "transformer"}}, "unknown network 'transformer'"),
        ({"model": {"name": "unet", "heads": 3}}, "no option 'heads'"),
        ({"preprocessing": {}}, "preprocessing cannot be restored"),
        ({"label_values": {"background": 0, "tumour": 70000}}, "do not fit uint16"),
        ({"postprocessing": {"sharpen": True}}, "sharpen"),
        ({"precision": "fp8"}, "precision 'fp8' is none of fp32, bf16, fp16"),
        ({"intensities": [{"name": "CT"}]}, "units"),
        ({"intensities": []}, "intensities of 0 channels, expected 1"),
        ({"patch_size": [8]}, "patch_size"),
        ({"context_slices": -1}, "context_slices"),
        ({"training_spacing_mm": {"min": [0, 1, 1], "median": [1, 1, 1], "max": [1, 1, 1]}}, "above zero"),
    ],
)
def test_a_description_that_makes_no_sense_is_named(tmp_path, changes, message):
    folder = save_model(tmp_path / "model", threshold_network())
    reseal(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        TrainedModel.load(folder)


def test_weights_that_are_not_finite_are_named(tmp_path):
    network = threshold_network()
    with torch.no_grad():
        network.heads[0].bias[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"weight heads\.0\.bias is NaN"):
        TrainedModel.load(save_model(tmp_path / "model", network))


@pytest.mark.parametrize(("name", "match"), [("absent", "no such folder"), (".", "neither a run folder")])
def test_a_folder_without_a_model_is_named(tmp_path, name, match):
    with pytest.raises(CheckpointError, match=match):
        TrainedModel.load(tmp_path / name)


def test_pixels_outside_those_of_training_are_resampled_to_the_median(tmp_path):
    ranges = {"min": [2.5, 0.6, 0.6], "median": [2.5, 0.7, 0.7], "max": [5.0, 0.9, 0.9]}
    model = TrainedModel.load(save_model(
        tmp_path / "m", threshold_network(dims=2), patch_size=(16, 16), training_spacing_mm=ranges))  # fmt: skip

    def spacing_seen(x, y, z):
        return model.geometry_of(
            Volume(np.zeros((100, 100, 10), np.int16), np.diag([x, y, z, 1.0]))
        ).spacing_mm

    assert spacing_seen(0.8, 0.8, 2.5) == pytest.approx((2.5, 0.8, 0.8))  # known
    assert spacing_seen(1.4, 1.4, 2.5) == pytest.approx((2.5, 0.7, 0.7))
    assert spacing_seen(0.8, 0.8, 10.0) == pytest.approx(
        (10.0, 0.8, 0.8)
    )  # slices of a 2D network stay apart
