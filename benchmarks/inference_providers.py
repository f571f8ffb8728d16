"""Ways to get the mask of a scan from a network that was trained on patches.

``lungkit`` is :class:`lungkit.Predictor`: from the stored int16 scan to the mask, slab by slab, with preprocessing. The
others start from a normalised float32 tensor, which is among their inputs: ``lungkit, tensor`` is
:func:`lungkit.inference.predict_label`; ``MONAI`` stitches the logits of the whole volume by the same number of patches
and the same Gaussian (cut off below 0.001 of its peak); ``direct`` puts the volume through the network at once. Both
then take the largest logit as lungkit does, which is faster than any call of torch. All in float32, which is the same
work for everyone; the predictor's own choice may be bf16.

Networks: ``attention`` is an attention U-Net, in 3D with features 8, 16, 32, in 2D, where it sees whole slices, with
16, 32, 64, 128. ``pointwise`` is one 1x1x1 convolution, which costs next to nothing: what is left is the stitching.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import OURS, Case, Provider
from torch import Tensor, nn

from lungkit import Predictor
from lungkit.data import ChannelNormalisation, Preprocessing, Volume
from lungkit.inference import Postprocessing, TrainedModel, predict_label
from lungkit.inference.patches import prediction_patch
from lungkit.inference.postprocessing import largest
from lungkit.nn import build_model

_HU = Preprocessing(
    (ChannelNormalisation((-1000.0, 1000.0), mean=0.0, std=1000.0, units="HU"),), label_map={0: 0, 1: 1}
)
_OVERLAP = 0.5

Inputs = tuple[Volume, Tensor]


def network_of(name: str, dims: int = 3) -> nn.Module:
    """A network in evaluation mode with fixed weights; ``pointwise`` says tumour above 0 HU."""
    if name == "attention":
        features = (8, 16, 32) if dims == 3 else (16, 32, 64, 128)
        return build_model("attention-unet", dims=dims, features=features, seed=0).eval()
    network = nn.Conv3d(1, 2, 1, bias=False).eval()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1))
    return network


@dataclass(frozen=True)
class InferenceCase(Case):
    """The mask of one scan of ``size`` voxels (Z, Y, X) by patches (Z, Y, X), or (Y, X) that are its slices."""

    network: str
    size: tuple[int, int, int]
    patch: tuple[int, ...]
    batch: int

    op = "inference"
    modes = ("forward",)

    @property
    def label(self) -> str:
        size, patch = ("x".join(map(str, numbers)) for numbers in (self.size, self.patch))
        return f"{size} {self.network} windows {patch} batch {self.batch}"

    @property
    def providers(self) -> tuple[str, ...]:
        fits = torch.Size(self.size).numel() <= 256**3
        return tuple(name for name in PROVIDERS if name != "direct" or fits)

    def main_bytes(self) -> int:
        """Those of the stored scan."""
        return 2 * torch.Size(self.size).numel()

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        hu = torch.randint(-1000, 1000, self.size, dtype=torch.int16, generator=generator)
        scan = Volume(hu.numpy().transpose(2, 1, 0), np.eye(4))
        return scan, (hu.float() / 1000).to(self.device)

    def build(self, provider: str, inputs: Inputs) -> Provider:
        run = PROVIDERS[provider](self, network_of(self.network, len(self.patch)).to(self.device))
        return Provider(lambda: run(inputs))


def _predictor(case: InferenceCase, network: nn.Module) -> Callable[[Inputs], Tensor]:
    model = TrainedModel(
        path=Path("benchmark"),
        network=network,
        preprocessing=_HU,
        labels={"background": 0, "tumour": 1},
        channels=("CT",),
        patch_size=case.patch,
        context_slices=0,
        spacing_range_mm=None,
        postprocessing=Postprocessing(),
        precision=None,
        digest="",
        description={},
    )
    predictor = Predictor(
        [model], device=case.device, precision="fp32", overlap=_OVERLAP, batch_size=case.batch
    )
    return lambda inputs: torch.from_numpy(predictor(inputs[0]).mask.transpose(2, 1, 0))


def _predict_label(case: InferenceCase, network: nn.Module) -> Callable[[Inputs], Tensor]:
    patch = prediction_patch(case.patch, case.size)
    options = {"overlap": _OVERLAP, "batch_size": case.batch}
    return lambda inputs: predict_label(network, inputs[1][None], patch, **options)


def _monai(case: InferenceCase, network: nn.Module, **weights: Any) -> Callable[[Inputs], Tensor]:
    from monai.inferers import sliding_window_inference

    patch = (1, *case.patch)[-3:]
    run_network = network if len(case.patch) == 3 else lambda x: network(x.squeeze(2)).unsqueeze(2)

    def run(inputs: Inputs) -> Tensor:
        image = inputs[1][None, None]
        with torch.no_grad():
            logits = sliding_window_inference(
                image, patch, case.batch, run_network, overlap=_OVERLAP, **(weights or {"mode": "gaussian"})
            )
        return largest(logits[0])

    return run


def _direct(case: InferenceCase, network: nn.Module) -> Callable[[Inputs], Tensor]:
    def run(inputs: Inputs) -> Tensor:
        image = inputs[1]
        with torch.no_grad():
            if len(case.patch) == 2:  # all slices are one batch
                return largest(network(image[:, None]).transpose(0, 1))
            return largest(network(image[None, None])[0])

    return run


PROVIDERS: dict[str, Callable[..., Callable[[Inputs], Tensor]]] = {
    OURS: _predictor,
    "lungkit, tensor": _predict_label,
    "MONAI": _monai,
    "direct": _direct,
}
