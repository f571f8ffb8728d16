"""What one model says of every voxel: mirror images, logits and probabilities, the attention map."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_cases import HU, random_network, save_model
from torch.nn import functional as F

from lungkit.data import Volume, preprocess_image
from lungkit.inference import TrainedModel
from lungkit.inference.scan_scores import NotFiniteError, scan_scores

CPU = torch.device("cpu")


def scan(shape=(24, 16, 8)) -> Volume:
    array = np.random.default_rng(0).integers(-900, 900, shape).astype(np.int16)
    return Volume(array, np.diag([0.7, 0.7, 2.5, 1.0]))


def model_of(tmp_path, dims: int) -> TrainedModel:
    network = random_network(dims=dims)
    return TrainedModel.load(save_model(tmp_path / "m", network, patch_size=(8, 16, 24)[-dims:]))


def direct(model: TrainedModel, volume: Volume) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (K, Z, Y, X) and the map of the finest gate (1, Z, Y, X), from the whole scan at once."""
    image = torch.from_numpy(preprocess_image(volume, HU).array)
    batch = image[None] if model.dims == 3 else image.transpose(0, 1)
    with torch.no_grad():
        logits, gates = model.network(batch, return_attention=True)
    finest = max(gates, key=lambda gate: gate.numel())
    alpha = F.interpolate(finest, size=batch.shape[2:], mode="trilinear" if model.dims == 3 else "bilinear")
    return (logits[0], alpha[0]) if model.dims == 3 else (logits.transpose(0, 1), alpha.transpose(0, 1))


@pytest.mark.parametrize("dims", [2, 3])
def test_probabilities_logits_and_attention_are_those_of_the_network(tmp_path, dims):
    model, volume = model_of(tmp_path, dims), scan()
    logits, alpha = direct(model, volume)
    found = scan_scores(model, [volume], CPU, "fp32", attention=True).read(0, 8)
    torch.testing.assert_close(found, torch.cat([logits.softmax(0), alpha]), rtol=0, atol=1e-4)
    found = scan_scores(model, [volume], CPU, "fp32", as_logits=True).read(0, 8)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_mirrored_logits_are_the_mean_over_all_mirror_images(tmp_path, dims):
    model, volume = model_of(tmp_path, dims), scan()
    found = scan_scores(model, [volume], CPU, "fp32", mirror=True, as_logits=True).read(0, 8)
    total = torch.zeros_like(found)
    for code in range(2**dims):
        axes = [axis for axis in range(dims) if code >> axis & 1]  # x, y, z of the stored scan
        flipped = Volume(np.ascontiguousarray(np.flip(volume.array, axes)), volume.affine)
        total += direct(model, flipped)[0].flip([3 - axis for axis in axes])
    torch.testing.assert_close(found, total / 2**dims, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", [None, (1.0, 1.4, 0.7)])
def test_scores_lie_on_the_scans_own_grid(tmp_path, spacing):
    model = replace(model_of(tmp_path, 3), preprocessing=replace(HU, target_spacing_mm=spacing))
    found = scan_scores(model, [scan()], CPU, "fp32")
    assert found.shape == (2, 8, 16, 24)
    torch.testing.assert_close(found.read(0, 8).sum(0), torch.ones(8, 16, 24))


def test_a_network_that_overflows_is_named_as_its_slices_are_read(tmp_path):
    model = model_of(tmp_path, 3)
    with torch.no_grad():
        model.network.heads[0].bias[0] = float("inf")
    slices = scan_scores(model, [scan()], CPU, "fp32")
    with pytest.raises(NotFiniteError, match="m"):
        slices.read(0, 8)
