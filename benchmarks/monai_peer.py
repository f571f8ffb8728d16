"""MONAI's networks for nodule_peers.py, trained and applied as MONAI's tutorials do it, in 2D on stacks of slices."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lungkit.data import read_volume, write_nifti
from lungkit.report.evaluation import find_label_scheme
from lungkit.training.schedule import learning_rate_factor

PATCH = (96, 96)


def train_monai(
    options: argparse.Namespace,
    train: Sequence[str],
    val: Sequence[str],
    masks: Path,
    dice_of: Callable[[Path], float],
) -> tuple[dict[str, Any], Callable[[Path, Path], None]]:
    """Train one of the networks; the masks are those of the last weights, which predict other images too."""
    from monai.data import CacheDataset, DataLoader, set_track_meta
    from monai.losses import DiceCELoss
    from monai.transforms import Compose
    from monai.utils import set_determinism

    set_determinism(options.seed)
    set_track_meta(False)
    budget, batch_size = 60 * options.minutes, options.batch_size or 16
    network = monai_network(options.peer, len(find_label_scheme(options.data).values))
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=1e-5)
    loss_of = DiceCELoss(softmax=True, to_onehot_y=True)
    slices = [
        {"image": image, "label": label[None]}
        for case in train
        for image, label in zip(*read_slices(options.data, case), strict=True)
    ]
    dataset = CacheDataset(slices, Compose(_training_transforms()), progress=False, num_workers=None)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=len(slices) >= batch_size,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    batches = _endless(loader)
    curve: list[tuple[float, float]] = []
    seconds, step = 0.0, 0
    while seconds < budget:
        started = time.perf_counter()
        batch = next(batches)
        factor = learning_rate_factor(step, None, schedule="polynomial", share=seconds / budget)
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * factor
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            logits = network(batch["image"])
        loss_of(logits.float(), batch["label"]).backward()
        optimiser.step()
        seconds, step = seconds + time.perf_counter() - started, step + 1
        if seconds >= min(budget, budget * (len(curve) + 1) / options.checkpoints):
            predict_monai(network, options.data, val, masks, bf16=options.bf16)
            curve.append((round(seconds, 2), dice_of(masks)))
            sys.stdout.write(f"{seconds:.0f} s, step {step}: mean Dice {curve[-1][1]:.4f}\n")
            sys.stdout.flush()
    found = {
        "tool": "MONAI",
        "network": f"{type(network).__name__}, 2D with both neighbours" + (", bf16" if options.bf16 else ""),
        "versions": {name: metadata.version(name) for name in ("monai", "torch")},
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "patch_size": list(PATCH),
        "batch_size": batch_size,
        "learning_rate": options.learning_rate,
        "workers": options.workers,
        "steps": step,
        "seconds": round(seconds, 2),
        "seconds_per_step": seconds / step,
        "curve": curve,
    }
    return found, lambda data, masks: predict_monai(network, data, val, masks, bf16=options.bf16)


def monai_network(peer: str, classes: int) -> torch.nn.Module:
    """The network of a peer, as MONAI makes it."""
    from monai.networks.nets import AttentionUnet, UNet

    shape = {
        "spatial_dims": 2,
        "in_channels": 3,
        "out_channels": classes,
        "channels": (16, 32, 64, 128, 256),
        "strides": (2, 2, 2, 2),
    }
    if peer == "monai-attention-unet":
        return AttentionUnet(**shape)
    return UNet(**shape, num_res_units=2, norm="batch")


def read_slices(data: Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Every slice with its neighbours, float32 (Z, 3, X, Y), and its label, uint8 (Z, X, Y); ends are repeated."""
    image = read_volume(data / "imagesTr" / f"{case}_0000.nii.gz").array.transpose(2, 0, 1)
    label = read_volume(data / "labelsTr" / f"{case}.nii.gz").array.transpose(2, 0, 1)
    padded = np.pad(image.astype(np.float32), ((1, 1), (0, 0), (0, 0)), mode="edge")
    return np.stack([padded[:-2], padded[1:-1], padded[2:]], axis=1), label.astype(np.uint8)


def predict_monai(
    network: torch.nn.Module, data: Path, cases: Sequence[str], masks: Path, *, bf16: bool
) -> None:
    """Write the masks of the cases, by MONAI's sliding window on every slice."""
    from monai.inferers import sliding_window_inference
    from monai.transforms import ScaleIntensity

    network.eval()
    for case in cases:
        slices = torch.stack(
            [torch.as_tensor(ScaleIntensity()(image)) for image in read_slices(data, case)[0]]
        )
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = sliding_window_inference(slices, PATCH, 16, network)
        affine = read_volume(data / "imagesTr" / f"{case}_0000.nii.gz").affine
        mask = logits.argmax(1).to(torch.uint8).numpy().transpose(1, 2, 0)
        write_nifti(masks / f"{case}.nii.gz", mask, affine)
    network.train()


def _training_transforms() -> list[Any]:
    from monai import transforms as tr

    both = ("image", "label")
    return [
        tr.ScaleIntensityd("image"),
        tr.EnsureTyped(both),
        tr.RandCropByPosNegLabeld(both, "label", PATCH, pos=1, neg=1, num_samples=1, allow_smaller=True),
        tr.ResizeWithPadOrCropd(both, PATCH),
        tr.RandFlipd(both, prob=0.5, spatial_axis=0),
        tr.RandFlipd(both, prob=0.5, spatial_axis=1),
        tr.RandRotated(both, range_x=math.radians(15), prob=0.2, mode=("bilinear", "nearest")),
        tr.RandZoomd(both, prob=0.2, min_zoom=0.9, max_zoom=1.1, mode=("bilinear", "nearest")),
        tr.RandScaleIntensityd("image", factors=0.1, prob=0.5),
        tr.RandShiftIntensityd("image", offsets=0.1, prob=0.5),
    ]


def _endless(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader
