"""U-Net in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.nn import _options
from lungkit.nn._grid import check_image, crop_to, pad_to_multiple, scales_of
from lungkit.nn.blocks import (
    ACTIVATIONS,
    UPSAMPLINGS,
    ConvBlock,
    Upsample,
    branch,
    concatenate,
    initialise,
    seeded,
)
from lungkit.nn.convolution import CONVOLUTIONS
from lungkit.nn.norms import NORMS
from lungkit.nn.pyramid import InputPyramid
from lungkit.nn.recalibration import SpatialChannelSqueezeExcite
from lungkit.nn.residual_stage import ResidualStage

Logits = Tensor | tuple[Tensor, ...]


class UNet(nn.Module):
    r"""U-Net: an encoder, a decoder, and skip connections that concatenate at every level.

    Level l has ``features[l]`` channels. Each level is a block of convolution, norm and activation; the first
    convolution of a coarser level carries the stride. The decoder upsamples, concatenates the skip features and
    applies a block of the same kind. A 1x1 convolution gives the logits.

    Args:
        dims: 2 or 3 spatial axes.
        in_channels: channels of the image.
        out_channels: K, classes of the logits (background included).
        features: channels per level, finest first; their number is the number of levels.
        strides: stride from each level to the next, ``len(features) - 1`` entries: an integer for all, or one
            entry per step, an integer or one integer per axis (Z, Y, X), e.g. ``((1, 2, 2), (2, 2, 2))`` for thick
            slices. A flat sequence means steps, not axes.
        kernel_size: odd; an integer for all levels, or one entry per level, an integer or one integer per axis.
        convolutions: convolutions per block; an integer, or one per level.
        norm: "instance", "batch", "group" or "none".
        groups: groups of the group norm; divides every entry of ``features``.
        activation: "leaky_relu" (slope 0.01), "relu", "elu", "gelu" or "silu".
        residual: residual blocks in place of plain ones.
        residual_encoder: residual blocks of two convolutions per level of the encoder, an integer or one per level,
            behind one convolution as a stem (nnU-Net's residual encoder U-Net); ``convolutions`` is then the decoder's.
            None is an encoder of the decoder's kind.
        decoder_convolutions: convolutions per block of the decoder, an integer or one per level but the coarsest,
            finest first; None is ``convolutions``.
        deep_supervision: in training return logits of every decoder level, each from features that the gated skip of
            its level has entered where there are gates (as in Abraham and Khan, 2019).
        dropout: probability of dropping a channel at the end of each block, in training.
        input_pyramid: every encoder level sees the image too, pooled to its grid; see
            :class:`lungkit.nn.pyramid.InputPyramid` (Abraham and Khan, 2019).
        decoder_scse: recalibrate the features of every decoder level by channel and by voxel; see
            :class:`lungkit.nn.recalibration.SpatialChannelSqueezeExcite` (Roy et al., 2018).
        upsampling: "transposed" (convolution with kernel = stride) or "interpolate" (linear).
        padding: sizes that the product of the strides does not divide: "auto" repeats the last voxels up to the
            next multiple and crops the results back; "error" refuses them.
        seed: seed of the initial weights; the global random state is left as it was. None draws from the
            global random state.

    Shapes:
        x (B, in_channels, \*S) -> logits (B, K, \*S).
        In training with ``deep_supervision`` a tuple of logits, finest first; entry l has the size of level l,
        S divided by the strides up to there, rounded up.
        ``return_attention=True`` gives ``(logits, maps)``; a U-Net has no attention maps, the tuple is empty.

    Raises:
        UsageError: an argument out of range, or an input that does not fit: the message names it.

    Source: Isensee et al., "nnU-Net Revisited", MICCAI 2024 (residual encoder).
    Ronneberger et al., "U-Net", MICCAI 2015; Cicek et al., "3D U-Net", MICCAI 2016; strided
    convolutions, instance norm, leaky ReLU and deep supervision as in Isensee et al., "nnU-Net", 2021.

    Example:
        >>> import torch
        >>> from lungkit.nn import UNet
        >>> network = UNet(2, in_channels=1, out_channels=2, features=(8, 16, 32))
        >>> network(torch.randn(1, 1, 45, 60)).shape
        torch.Size([1, 2, 45, 60])
        >>> thick_slices = UNet(3, features=(8, 16, 32), strides=((1, 2, 2), 2), kernel_size=((1, 3, 3), 3, 3))
        >>> thick_slices(torch.randn(1, 1, 6, 32, 32)).shape
        torch.Size([1, 2, 6, 32, 32])
    """

    name = "unet"

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        features: Sequence[int] = (16, 32, 64, 128),
        strides: _options.LevelValue = 2,
        kernel_size: _options.LevelValue = 3,
        convolutions: int | Sequence[int] = 2,
        norm: Literal["instance", "batch", "group", "none"] = "instance",
        groups: int = 8,
        activation: str = "leaky_relu",
        residual: bool = False,
        residual_encoder: int | Sequence[int] | None = None,
        decoder_convolutions: int | Sequence[int] | None = None,
        deep_supervision: bool = False,
        dropout: float = 0.0,
        input_pyramid: bool = False,
        decoder_scse: bool = False,
        upsampling: Literal["transposed", "interpolate"] = "transposed",
        padding: Literal["auto", "error"] = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.dims = _options.check_dims(dims)
        self.in_channels = _options.check_integer("in_channels", in_channels)
        self.out_channels = _options.check_integer("out_channels", out_channels)
        self.features = _options.check_features(features)
        levels = len(self.features)
        self.strides = _options.per_level_per_axis("strides", strides, levels=levels - 1, dims=self.dims)
        self.norm = _options.check_choice("norm", norm, NORMS)
        self.deep_supervision = bool(deep_supervision)
        self.padding = _options.check_choice("padding", padding, ("auto", "error"))
        kernels = _options.per_level_per_axis(
            "kernel_size",
            kernel_size,
            levels=levels,
            dims=self.dims,
            fits=_options.is_odd,
            rule="an odd integer",
        )
        counts = _options.per_level("convolutions", convolutions, levels=levels)
        decoder_counts = counts[:-1]
        if decoder_convolutions is not None:
            decoder_counts = _options.per_level(
                "decoder_convolutions", decoder_convolutions, levels=levels - 1
            )
        blocks: list[int] | None = None
        if residual_encoder is not None:
            blocks = _options.per_level("residual_encoder", residual_encoder, levels=levels)
        block: dict[str, Any] = {
            "norm": self.norm,
            "groups": _options.check_integer("groups", groups),
            "activation": _options.check_choice("activation", activation, ACTIVATIONS),
            "residual": bool(residual),
            "dropout": _options.check_probability("dropout", dropout),
        }
        _options.check_choice("upsampling", upsampling, UPSAMPLINGS)
        if seed is not None:
            _options.check_integer("seed", seed, minimum=0)
        self.scales = scales_of(self.strides, self.dims)
        self._config: dict[str, Any] = {
            "name": self.name,
            "dims": self.dims,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "features": self.features,
            "strides": self.strides,
            "kernel_size": kernels,
            "convolutions": counts,
            **block,
            "residual_encoder": blocks,
            "decoder_convolutions": None if decoder_convolutions is None else decoder_counts,
            "deep_supervision": self.deep_supervision,
            "input_pyramid": bool(input_pyramid),
            "decoder_scse": bool(decoder_scse),
            "upsampling": upsampling,
            "padding": self.padding,
            "seed": seed,
        }
        with seeded(seed):
            self.encoder = nn.ModuleList(
                self._encoder_level(level, kernels[level], counts[level], blocks, block)
                for level in range(levels)
            )
            self.upsample = nn.ModuleList(
                Upsample(
                    self.dims,
                    self.features[level + 1],
                    self.features[level],
                    stride=self.strides[level],
                    mode=upsampling,
                )
                for level in range(levels - 1)
            )
            self.decoder = nn.ModuleList(
                ConvBlock(
                    self.dims,
                    2 * self.features[level],
                    self.features[level],
                    kernel_size=kernels[level],
                    convolutions=decoder_counts[level],
                    **block,
                )
                for level in range(levels - 1)
            )
            heads = levels - 1 if self.deep_supervision else 1
            self.heads = nn.ModuleList(
                CONVOLUTIONS[self.dims](self.features[level], self.out_channels, 1) for level in range(heads)
            )
            self.apply(initialise)
        # Drawn apart from the rest: with one seed the weights that networks have in common are equal.
        with seeded(None if seed is None else seed + 2):
            self.pyramid: InputPyramid | None = None
            if input_pyramid:
                self.pyramid = InputPyramid(
                    self.dims,
                    self.in_channels,
                    self.features,
                    strides=self.strides,
                    kernel_sizes=kernels,
                    **{name: block[name] for name in ("norm", "groups", "activation")},
                )
                self.pyramid.apply(initialise)
            self.recalibration: nn.ModuleList | None = None
            if decoder_scse:
                self.recalibration = nn.ModuleList(
                    SpatialChannelSqueezeExcite(self.dims, self.features[level])
                    for level in range(levels - 1)
                )
                self.recalibration.apply(initialise)

    def _encoder_level(
        self,
        level: int,
        kernel_size: tuple[int, ...],
        convolutions: int,
        blocks: list[int] | None,
        options: dict[str, Any],
    ) -> nn.Module:
        place: dict[str, Any] = {
            "kernel_size": kernel_size,
            "stride": self.strides[level - 1] if level else None,
        }
        channels = self.features[level - 1] if level else self.in_channels
        if blocks is None:
            return ConvBlock(
                self.dims, channels, self.features[level], convolutions=convolutions, **place, **options
            )
        return ResidualStage(
            self.dims,
            channels,
            self.features[level],
            blocks=blocks[level],
            stem=level == 0,
            **place,
            **options,
        )

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments in plain types, with the name: ``build_model(**config)`` builds the same network."""
        return {key: _options.plain(value) for key, value in self._config.items()}

    def forward(
        self, x: Tensor, *, return_attention: bool = False
    ) -> Logits | tuple[Logits, tuple[Tensor, ...]]:
        self._check_input(x)
        size = x.shape[2:]
        x = pad_to_multiple(x, self.scales[-1])
        besides: list[Tensor | None] = [None] * len(self.encoder)
        if self.pyramid is not None:
            besides[1:] = self.pyramid(x)
        skips = []
        for block, beside in zip(self.encoder, besides, strict=True):
            x = block(x, beside=beside)
            skips.append(x)
        deep = self.deep_supervision and self.training
        logits: list[Tensor] = []
        maps: list[Tensor] = []
        for level in reversed(range(len(self.decoder))):
            skip, alpha = self._gate(level, branch(skips[level]), x)
            # The upsampled features come first, as in nnU-Net.
            x = self.decoder[level](concatenate(self.upsample[level](x), skip))
            if self.recalibration is not None:
                x = self.recalibration[level](x)
            if level == 0 or deep:
                logits.insert(0, crop_to(self.heads[level](x), size, self.scales[level]))
            if return_attention and alpha is not None:
                maps.insert(0, crop_to(alpha, size, self.scales[level]))
        result = tuple(logits) if deep else logits[0]
        return (result, tuple(maps)) if return_attention else result

    def _gate(self, level: int, skip: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """Skip features of ``level`` as the decoder takes them, and their attention map."""
        return skip, None

    def _check_input(self, x: Tensor) -> None:
        multiple = self.scales[-1]
        check_image(x, dims=self.dims, channels=self.in_channels, multiple=multiple, padding=self.padding)
        size = tuple(x.shape[2:])
        if self.norm == "instance" and all(n <= m for n, m in zip(size, multiple, strict=True)):
            raise UsageError(
                f"x of size {size} leaves one voxel at the coarsest level (stride {multiple}), and instance norm "
                f"needs two or more: use a larger input, fewer levels or another norm"
            )
