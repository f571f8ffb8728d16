"""What nnU-Net does with a scan, written down plainly with scipy, for tests where nnU-Net is not installed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

CONVOLUTIONS: dict[int, Any] = {2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Any] = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
POOLS: dict[int, Any] = {2: F.avg_pool2d, 3: F.avg_pool3d}


def network_logits(state: Mapping[str, Tensor], arch: Mapping[str, Any], x: Tensor) -> Tensor:
    """Logits of nnU-Net's network from its state dict."""
    dims = x.dim() - 2

    def unit(name: str, x: Tensor, stride: Sequence[int] | int = 1, *, act: bool = True) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        padding = [k // 2 for k in weight.shape[2:]]
        x = CONVOLUTIONS[dims](x, weight, state.get(f"{name}.conv.bias"), stride, padding)
        x = F.instance_norm(x, weight=state[f"{name}.norm.weight"], bias=state[f"{name}.norm.bias"])
        return F.leaky_relu(x, 0.01) if act else x

    residual = "n_blocks_per_stage" in arch
    if residual:
        x = unit("encoder.stem.convs.0", x)
    skips = []
    for stage, stride in enumerate(arch["strides"]):
        for index in range(arch["n_blocks_per_stage" if residual else "n_conv_per_stage"][stage]):
            step = stride if index == 0 else 1
            if not residual:
                x = unit(f"encoder.stages.{stage}.0.convs.{index}", x, step)
                continue
            block = f"encoder.stages.{stage}.blocks.{index}"
            short = POOLS[dims](x, stride, stride) if index == 0 and max(stride) > 1 else x
            for name in (f"{block}.skip.0", f"{block}.skip.1"):
                if f"{name}.conv.weight" in state:
                    short = unit(name, short, act=False)
            x = F.leaky_relu(unit(f"{block}.conv2", unit(f"{block}.conv1", x, step), act=False) + short, 0.01)
        skips.append(x)
    for stage in range(len(skips) - 1):
        stride = arch["strides"][-stage - 1]
        name = f"decoder.transpconvs.{stage}"
        x = TRANSPOSED[dims](x, state[f"{name}.weight"], state[f"{name}.bias"], stride)
        x = torch.cat([x, skips[-stage - 2]], 1)
        for index in range(arch["n_conv_per_stage_decoder"][stage]):
            x = unit(f"decoder.stages.{stage}.convs.{index}", x)
    head = f"decoder.seg_layers.{len(skips) - 2}"
    return CONVOLUTIONS[dims](x, state[f"{head}.weight"], state[f"{head}.bias"])


def resample(
    data: np.ndarray, shape: Sequence[int], spacings: Sequence[Sequence[float]], order: int
) -> np.ndarray:
    """(C, Z, Y, X) as nnU-Net resamples: a spline, but slice by slice where the spacing differs by more than 3."""
    if data.shape[1:] == tuple(shape):
        return data
    axis = next((int(np.argmax(s)) for s in spacings if max(s) / min(s) > 3), None)

    def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
        factors = np.divide(size, image.shape)
        out = ndimage.zoom(image.astype(float), factors, order=order, mode="nearest", grid_mode=True)
        return np.clip(out, image.min(), image.max())

    if axis is None:
        return np.stack([resize(channel, shape) for channel in data])
    old, new = data.shape[axis + 1], shape[axis]
    size = [n for index, n in enumerate(shape) if index != axis]
    slices = np.stack([[resize(s, size) for s in np.moveaxis(channel, axis, 0)] for channel in data])
    nearest = np.floor((np.arange(new) + 0.5) * old / new).astype(int)
    return np.moveaxis(slices[:, nearest], 1, axis + 1)


def predict(
    folder: Path, scan: np.ndarray, spacing: Sequence[float], *, fold: str = "0", mirror: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised, resampled image and the logits on the scan's grid (cropped to what is not 0), both (C, Z, Y, X)."""
    plans = json.loads((folder / "plans.json").read_text())
    (settings,) = plans["configurations"].values()
    checkpoint = torch.load(folder / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)
    order = plans["transpose_forward"]
    data = scan.astype(np.float32).transpose(0, *(axis + 1 for axis in order))
    own = [spacing[axis] for axis in order]
    target = [own[0], *settings["spacing"]][-3:]
    nonzero = ndimage.binary_fill_holes((data != 0).any(0))
    box = (slice(None), *ndimage.find_objects(nonzero.astype(int))[0])
    data, nonzero = data[box], nonzero[box[1:]]
    shape = [round(a / b * n) for a, b, n in zip(own, target, data.shape[1:], strict=True)]
    normalised = [
        normalise(
            channel, scheme, mask, nonzero, plans["foreground_intensity_properties_per_channel"][str(index)]
        )
        for index, (channel, scheme, mask) in enumerate(
            zip(data, settings["normalization_schemes"], settings["use_mask_for_norm"], strict=True)
        )
    ]
    image = resample(np.stack(normalised), shape, (own, target), 3).astype(np.float32)
    logits = window(checkpoint, settings, torch.from_numpy(image), mirror).numpy()
    return image, resample(logits, data.shape[1:], (target, own), 1)


def normalise(
    image: np.ndarray, scheme: str, use_mask: bool, nonzero: np.ndarray, known: Mapping[str, float]
) -> np.ndarray:
    if scheme == "CTNormalization":
        clipped = np.clip(image, known["percentile_00_5"], known["percentile_99_5"])
        return (clipped - known["mean"]) / known["std"]
    if scheme == "ZScoreNormalization":
        inside = nonzero if use_mask else np.ones_like(nonzero)
        return np.where(inside, (image - image[inside].mean()) / image[inside].std(), image)
    if scheme == "RescaleTo01Normalization":
        return (image - image.min()) / (image.max() - image.min())
    return image / 255 if scheme == "RGBTo01Normalization" else image


def window(checkpoint: Mapping[str, Any], settings: Mapping[str, Any], image: Tensor, mirror: bool) -> Tensor:
    arch, weights = settings["architecture"]["arch_kwargs"], checkpoint["network_weights"]
    patch = settings["patch_size"]
    dims = len(patch)
    missing = [max(0, p - n) for p, n in zip(patch, image.shape[-dims:], strict=True)]
    image = F.pad(image, [side for m in reversed(missing) for side in (m // 2, m - m // 2)])
    extent = image.shape[-dims:]
    starts = []
    for n, p in zip(extent, patch, strict=True):
        count = int(np.ceil((n - p) / (p * 0.5))) + 1
        starts.append([round((n - p) / max(1, count - 1) * i) for i in range(count)])
    impulse = np.zeros(patch)
    impulse[tuple(p // 2 for p in patch)] = 1
    weight = torch.from_numpy(
        ndimage.gaussian_filter(impulse, [p / 8 for p in patch], mode="constant")
    ).float()
    axes = checkpoint["inference_allowed_mirroring_axes"] if mirror else ()
    flips = [c for k in range(len(axes) + 1) for c in itertools.combinations([a + 2 for a in axes], k)]
    slices = range(image.shape[1]) if dims == 2 else [slice(None)]
    outputs = weights[f"decoder.seg_layers.{len(arch['strides']) - 2}.weight"].shape[0]
    total, weight_sum = torch.zeros(outputs, *image.shape[1:]), torch.zeros(image.shape[1:])
    for z in slices:
        for corner in itertools.product(*starts):
            inside = tuple(slice(s, s + p) for s, p in zip(corner, patch, strict=True))
            place = (z, *inside) if dims == 2 else inside
            x = image[(slice(None), *place)][None]
            logits = sum(network_logits(weights, arch, x.flip(f)).flip(f) for f in flips) / len(flips)
            total[(slice(None), *place)] += logits[0] * weight
            weight_sum[place] += weight
    total /= weight_sum
    cut = tuple(slice(m // 2, n - (m - m // 2)) for m, n in zip(missing, extent, strict=True))
    return total[(slice(None), slice(None), *cut)[: None if dims == 2 else 1] + (() if dims == 2 else cut)]
