"""Small trained models for tests of prediction: checkpoints with known weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lungkit.checkpoint import save_checkpoint
from lungkit.data import ChannelNormalisation, Preprocessing
from lungkit.nn import build_model

HU = Preprocessing(
    (ChannelNormalisation((-1000.0, 1000.0), mean=0.0, std=1000.0, units="HU"),), label_map={0: 0, 1: 1}
)  # normalised intensities are HU / 1000


def threshold_network(at: float = 0.0, *, dims: int = 3, channels: int = 1) -> nn.Module:
    """A U-Net of 1 x 1 kernels: class 1 where the first channel is above ``at``, voxel by voxel."""
    network = build_model(
        "unet", dims=dims, in_channels=channels, out_channels=2, features=(2, 2), strides=(1,), kernel_size=1,
        convolutions=1, norm="none", activation="relu", upsampling="interpolate", seed=0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        weights = {name: parameter.reshape(parameter.shape[:2]) for name, parameter in network.named_parameters()
                   if name.endswith("weight")}  # fmt: skip
        # relu(x - at) and relu(at - x), handed on by the skip connection, are the logits, times 4.
        weights["encoder.0.units.0.conv.weight"][:, 0] = torch.tensor([1.0, -1.0])
        network.get_parameter("encoder.0.units.0.conv.bias").copy_(torch.tensor([-at, at]))
        weights["decoder.0.units.0.conv.weight"][:, 2:] = torch.eye(2)
        weights["heads.0.weight"].copy_(torch.tensor([[0.0, 4.0], [4.0, 0.0]]))
    return network


def random_network(
    *, dims: int = 3, channels: int = 1, name: str = "attention-unet", seed: int = 0
) -> nn.Module:
    """A network that looks round every voxel, of random weights."""
    return build_model(name, dims=dims, in_channels=channels, out_channels=2, features=(4, 8), seed=seed)


def save_model(
    folder: Path,
    network: nn.Module,
    *,
    preprocessing: Preprocessing = HU,
    patch_size: tuple[int, ...] = (8, 16, 16),
    label_values: Mapping[str, int] | None = None,
    channels: tuple[str, ...] = ("CT",),
    **description: Any,
) -> Path:
    """Write a checkpoint of ``network`` to ``folder`` and return it."""
    values = dict(label_values or {"background": 0, "tumour": 1})
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        folder,
        weights=network.state_dict(),
        description={
            "epoch": 1,
            "model": dict(network.config),  # type: ignore[arg-type]
            "preprocessing": preprocessing.to_dict(),
            "labels": {name: index for index, name in enumerate(values)},
            "label_values": values,
            "channels": list(channels),
            "patch_size": list(patch_size),
            "context_slices": 0,
            **description,
        },
        trainer={},
    )
    return folder
