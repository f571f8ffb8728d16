"""What nnU-Net's plans.json and dataset.json say, in lungkit's terms."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, cast

from lungkit.data.geometry import Axes
from lungkit.data.normalisation import ChannelNormalisation, Interpolation, Statistics
from lungkit.data.preprocessing import Preprocessing
from lungkit.data.resampling import Filter
from lungkit.errors import UnsupportedModelError

_READERS: dict[str, Literal["stored", "RAS"]] = {
    "SimpleITKIO": "stored",
    "NibabelIO": "stored",
    "NibabelIOWithReorient": "RAS",
}
_FILTERS: dict[int, Filter] = {0: "nearest", 1: "linear", 3: "cubic"}
_NORMALISATIONS = (
    "CTNormalization",
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)
_RESAMPLING = "resample_data_or_seg_to_shape"
_ACTIVATIONS = {"LeakyReLU": "leaky_relu", "ReLU": "relu"}

# What nnU-Net's networks take besides shapes, and the only value of it that lungkit's networks have.
_FIXED = {
    "nonlin_first": False,
    "pool": "conv",
    "pool_type": "conv",
    "squeeze_excitation": False,
    "disable_default_stem": False,
    "bottleneck_channels": None,
    "stem_channels": None,
    "block": "BasicBlockD",
}
_SHAPES = (
    "n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage",
    "n_conv_per_stage_decoder", "conv_bias", "norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs", "deep_supervision",
)  # fmt: skip
# These do nothing once a network is trained.
_IN_TRAINING = ("dropout_op", "dropout_op_kwargs", "stochastic_depth_p", "squeeze_excitation_reduction_ratio")


def resolve_configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration ``name`` of the plans, with what it inherits.

    Raises:
        UnsupportedModelError: it is the second stage of a cascade, or preprocessed by code of its own.
        LookupError: there is none of that name.
    """
    configurations = plans["configurations"]
    resolved: dict[str, Any] = {}
    parent, seen = name, set()
    while parent is not None and parent not in seen:
        seen.add(parent)
        own = configurations[parent]
        resolved = {**copy.deepcopy(own), **resolved}
        parent = own.get("inherits_from")
    if resolved.get("previous_stage"):
        raise UnsupportedModelError(
            f"configuration {name} is the second stage of a cascade (after {resolved['previous_stage']}), which "
            "lungkit does not have; import 3d_fullres, 3d_lowres or 2d"
        )
    if resolved.get("preprocessor_name", "DefaultPreprocessor") != "DefaultPreprocessor":
        raise UnsupportedModelError(
            f"preprocessor {resolved['preprocessor_name']}; only DefaultPreprocessor is known"
        )
    return resolved


def preprocessing_of(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], *, channels: int, classes: int
) -> Preprocessing:
    """nnU-Net's way from a scan to the network: axes, crop, normalisation, resampling.

    Raises:
        UnsupportedModelError: a normalisation, reader or resampling that lungkit does not have.
    """
    reader = plans.get("image_reader_writer", "SimpleITKIO")
    if reader not in _READERS:
        raise UnsupportedModelError(f"image reader {reader}; known are {', '.join(_READERS)}")
    first, second, third = (int(axis) for axis in plans.get("transpose_forward", (0, 1, 2)))
    schemes, masked = configuration["normalization_schemes"], configuration["use_mask_for_norm"]
    if len(schemes) != channels:
        raise UnsupportedModelError(
            f"{len(schemes)} normalisation schemes for {channels} channels of dataset.json"
        )
    intensities = plans.get(
        "foreground_intensity_properties_per_channel",
        plans.get("foreground_intensity_properties_by_modality", {}),
    )
    spacing = [float(length) for length in configuration["spacing"]]
    depth = spacing[0] if len(spacing) == 3 else None
    return Preprocessing(
        channels=tuple(
            _normalisation(scheme, bool(use_mask), intensities.get(str(index), {}))
            for index, (scheme, use_mask) in enumerate(zip(schemes, masked, strict=True))
        ),
        label_map={index: index for index in range(classes)},
        target_spacing_mm=(depth, spacing[-2], spacing[-1]),
        axes=Axes(_READERS[reader], (first, second, third)),
        crop="nonzero",
        image_interpolation=_interpolation(configuration, "resampling_fn_data"),
        score_interpolation=_interpolation(configuration, "resampling_fn_probabilities"),
    )


def _normalisation(scheme: str, use_mask: bool, known: Mapping[str, float]) -> ChannelNormalisation:
    if scheme not in _NORMALISATIONS:
        raise UnsupportedModelError(f"normalisation {scheme}; known are {', '.join(_NORMALISATIONS)}")
    if scheme == "CTNormalization":
        window = float(known["percentile_00_5"]), float(known["percentile_99_5"])
        return ChannelNormalisation(window, float(known["mean"]), max(float(known["std"]), 1e-8), "HU")
    statistics: Statistics = "training"
    if scheme == "ZScoreNormalization":
        statistics = "nonzero" if use_mask else "scan"
    elif scheme == "RescaleTo01Normalization":
        statistics = "range"
    std = 255.0 if scheme == "RGBTo01Normalization" else 1.0
    return ChannelNormalisation(None, 0.0, std, "arbitrary", statistics)


def _interpolation(configuration: Mapping[str, Any], which: str) -> Interpolation:
    name, options = configuration.get(which, _RESAMPLING), configuration.get(f"{which}_kwargs", {})
    order, order_z = options.get("order", 3), options.get("order_z", 0)
    separate = options.get("force_separate_z")
    if name != _RESAMPLING or order not in _FILTERS or order_z != 0 or separate not in (None, False):
        raise UnsupportedModelError(
            f"{which}: {name} with {dict(options)}; known is {_RESAMPLING} of order 0, 1 or 3, order_z 0 and "
            "force_separate_z null or false"
        )
    through_plane: Filter | None = None if separate is False else "nearest"
    return Interpolation(
        _FILTERS[order], through_plane, float(options.get("separate_z_anisotropy_threshold", 3.0))
    )


def network_options(configuration: Mapping[str, Any], *, channels: int, outputs: int) -> dict[str, Any]:
    """Options of :class:`lungkit.nn.UNet` for the network of a configuration.

    Raises:
        UnsupportedModelError: another architecture, or an option that lungkit's U-Net does not have.
    """
    name, given = _architecture(configuration)
    if name not in ("PlainConvUNet", "ResidualEncoderUNet"):
        raise UnsupportedModelError(f"architecture {name}; known are PlainConvUNet and ResidualEncoderUNet")
    for option, value in given.items():
        if option in _FIXED and not _same(value, _FIXED[option]):
            raise UnsupportedModelError(f"architecture {name} with {option} = {value!r}")
        if option not in (*_FIXED, *_SHAPES, *_IN_TRAINING):
            raise UnsupportedModelError(f"architecture {name} with an unknown option {option} = {value!r}")
    dims, stages = len(configuration["patch_size"]), int(given["n_stages"])
    norm = dict(given.get("norm_op_kwargs") or {})
    activation = _ACTIVATIONS.get(_last(given["nonlin"]))
    slope = (given.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)
    if (
        _last(given["norm_op"]) != f"InstanceNorm{dims}d"
        or not norm.get("affine", False)
        or norm.get("eps", 1e-5) != 1e-5
    ):
        raise UnsupportedModelError(
            f"norm {given['norm_op']} with {norm}; known is affine InstanceNorm of eps 1e-5"
        )
    if activation is None or (activation == "leaky_relu" and slope != 0.01):
        raise UnsupportedModelError(
            f"activation {given['nonlin']} of slope {slope}; known are LeakyReLU of 0.01 and ReLU"
        )
    first, *strides = _per_stage(given["strides"], stages)
    if any(step != 1 for step in (first if isinstance(first, list) else [first])):
        raise UnsupportedModelError(f"stride {first} at the first level; known is 1")
    features = _per_stage(given["features_per_stage"], stages)
    decoder = given["n_conv_per_stage_decoder"]
    residual = name == "ResidualEncoderUNet"
    repeats = _per_stage(given["n_blocks_per_stage" if residual else "n_conv_per_stage"], stages)
    return {
        "name": "unet",
        "dims": dims,
        "in_channels": channels,
        "out_channels": outputs,
        "features": features,
        "strides": strides,
        "kernel_size": _per_stage(given["kernel_sizes"], stages),
        "convolutions": 2 if residual else repeats,
        "residual_encoder": repeats if residual else None,
        # nnU-Net counts decoder levels from the coarsest.
        "decoder_convolutions": _per_stage(decoder, stages - 1)[::-1],
        "norm": "instance",
        "activation": activation,
        "deep_supervision": True,
    }


def _architecture(configuration: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class name and arguments of the network; before version 2.3 the plans held them one by one."""
    if "architecture" in configuration:
        architecture = configuration["architecture"]
        return _last(architecture["network_class_name"]), dict(architecture["arch_kwargs"])
    name = str(configuration["UNet_class_name"])
    stages, dims = len(configuration["n_conv_per_stage_encoder"]), len(configuration["patch_size"])
    widths = (configuration["UNet_base_num_features"] * 2**stage for stage in range(stages))
    repeats = "n_blocks_per_stage" if name == "ResidualEncoderUNet" else "n_conv_per_stage"
    return name, {
        "n_stages": stages,
        "features_per_stage": [min(width, configuration["unet_max_num_features"]) for width in widths],
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        repeats: configuration["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "norm_op": f"InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "LeakyReLU",
    }


def _same(value: Any, fixed: Any) -> bool:
    return value == fixed or (isinstance(value, str) and _last(value) == fixed)


def _last(name: Any) -> str:
    return str(name).rpartition(".")[2]


def _per_stage(value: Any, stages: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * stages


def channel_names(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the channels in their order; nnU-Net 1 called them modalities.

    Example:
        >>> channel_names({"channel_names": {"1": "PET", "0": "CT"}})
        ('CT', 'PET')
    """
    names = cast("dict[str, Any]", dataset.get("channel_names") or dataset["modality"])
    return tuple(str(names[key]) for key in sorted(names, key=int))
