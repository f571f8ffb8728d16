"""A trained model of nnU-Net on disk, made without nnU-Net: its files, its names, random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FEATURES = (4, 6, 6)
IO = "SimpleITKIO"


def write_nnunet_model(
    root: Path,
    *,
    dims: int = 2,
    residual: bool = False,
    folds: Sequence[str] = ("0",),
    channels: Mapping[str, str] | None = None,
    labels: Mapping[str, Any] | None = None,
    regions_class_order: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    patch_size: Sequence[int] | None = None,
    plans: Mapping[str, Any] | None = None,
    configuration: Mapping[str, Any] | None = None,
    arch: Mapping[str, Any] | None = None,
    mirror_axes: Sequence[int] | None = (0, 1),
) -> Path:
    """Write TRAINER__PLANS__CONFIGURATION below ``root``; the last options replace entries of their files."""
    name = "2d" if dims == 2 else "3d_fullres"
    folder = root / f"nnUNetTrainer__nnUNetPlans__{name}"
    channels = channels or {"0": "CT"}
    labels = labels or {"background": 0, "tumour": 1}
    kernels = [[3] * dims for _ in FEATURES]
    strides = [[1] * dims, [2] * dims, [1, 2, 2][-dims:]]
    kind = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    module = "residual_unet" if residual else "unet"
    arch_kwargs: dict[str, Any] = {
        "n_stages": len(FEATURES),
        "features_per_stage": list(FEATURES),
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": kernels,
        "strides": strides,
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [1, 2, 2],
        "n_conv_per_stage_decoder": [2, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **(arch or {}),
    }
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    settings: dict[str, Any] = {
        "data_identifier": f"nnUNetPlans_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch_size or [12, 16, 16][-dims:]),
        "median_image_size_in_voxels": [24.0] * dims,
        "spacing": list(spacing or [2.5, 1.0, 1.0][-dims:]),
        "normalization_schemes": ["CTNormalization"] * len(channels),
        "use_mask_for_norm": [False] * len(channels),
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.{module}.{kind}",
            "arch_kwargs": arch_kwargs,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": True,
        **(configuration or {}),
    }
    intensities = {"mean": -300.0, "std": 350.0, "percentile_00_5": -990.0, "percentile_99_5": 260.0}
    folder.mkdir(parents=True)
    content: dict[str, Any] = {
        "dataset_name": "Dataset001_Phantom",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.5, 1.0, 1.0],
        "original_median_shape_after_transp": [12, 24, 24],
        "image_reader_writer": IO,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {name: settings},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(index): intensities for index in range(len(channels))
        },
        **(plans or {}),
    }
    dataset = {
        "channel_names": dict(channels),
        "labels": dict(labels),
        "numTraining": 1,
        "file_ending": ".nii.gz",
        **({"regions_class_order": list(regions_class_order)} if regions_class_order else {}),
    }
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    outputs = len([name for name in labels if name != "ignore"]) - bool(regions_class_order)
    for seed, fold in enumerate(folds):
        (folder / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": nnunet_state_dict(len(channels), outputs, arch_kwargs, dims, seed),
                "optimizer_state": {"state": {}, "param_groups": []},
                "grad_scaler_state": None,
                # nnU-Net logs numpy's scalars.
                "logging": {
                    "mean_fg_dice": [np.float64(0.5)],
                    "dice_per_class_or_region": [[np.float32(0.5)]],
                },
                "_best_ema": np.float64(0.5),
                "current_epoch": 2,
                "init_args": {"plans": content, "configuration": name, "fold": fold, "dataset_json": dataset},
                "trainer_name": "nnUNetTrainer",
                "inference_allowed_mirroring_axes": mirror_axes and tuple(range(dims)),
            },
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return folder


def nnunet_state_dict(
    channels: int, outputs: int, arch: Mapping[str, Any], dims: int, seed: int
) -> dict[str, Tensor]:
    """Random weights under nnU-Net's names: the decoder holds the encoder again, each block its layers twice."""
    generator = torch.Generator().manual_seed(seed)
    features, kernels, strides = arch["features_per_stage"], arch["kernel_sizes"], arch["strides"]
    state: dict[str, Tensor] = {}

    def draw(*shape: int) -> Tensor:
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        return torch.randn(shape, generator=generator) * (2 / fan) ** 0.5

    def unit(name: str, before: int, after: int, kernel: Sequence[int], *, bias: bool = True) -> None:
        layers = [("conv.weight", draw(after, before, *kernel))]
        layers += [("conv.bias", draw(after))] if bias else []
        layers += [("norm.weight", 1 + 0.2 * draw(after)), ("norm.bias", draw(after))]
        twice = {"conv": "all_modules.0", "norm": "all_modules.1"}
        for key, value in layers:
            layer, _, parameter = key.partition(".")
            state[f"{name}.{key}"] = state[f"{name}.{twice[layer]}.{parameter}"] = value

    before = channels
    residual = "n_blocks_per_stage" in arch
    if residual:
        unit("encoder.stem.convs.0", channels, features[0], kernels[0])
        before = features[0]
    for stage, (after, kernel, stride) in enumerate(zip(features, kernels, strides, strict=True)):
        for index in range(arch["n_blocks_per_stage" if residual else "n_conv_per_stage"][stage]):
            if not residual:
                unit(f"encoder.stages.{stage}.0.convs.{index}", before, after, kernel)
            else:
                block = f"encoder.stages.{stage}.blocks.{index}"
                unit(f"{block}.conv1", before, after, kernel)
                unit(f"{block}.conv2", after, after, kernel)
                if before != after:
                    pooled = index == 0 and max(stride) > 1
                    unit(f"{block}.skip.{int(pooled)}", before, after, [1] * dims, bias=False)
            before = after
    state |= {f"decoder.{name}": value for name, value in state.items()}
    for stage in range(len(features) - 1):
        below, skip = features[-stage - 1], features[-stage - 2]
        state[f"decoder.transpconvs.{stage}.weight"] = draw(below, skip, *strides[-stage - 1])
        state[f"decoder.transpconvs.{stage}.bias"] = draw(skip)
        for index in range(arch["n_conv_per_stage_decoder"][stage]):
            unit(
                f"decoder.stages.{stage}.convs.{index}",
                skip if index else 2 * skip,
                skip,
                kernels[-stage - 2],
            )
        state[f"decoder.seg_layers.{stage}.weight"] = draw(outputs, skip, *[1] * dims)
        state[f"decoder.seg_layers.{stage}.bias"] = draw(outputs)
    return state
