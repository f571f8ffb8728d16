"""Multi-scale input: the image itself, pooled, at every level of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lungkit.nn.blocks import AVERAGE_POOLS, ConvUnit
from lungkit.nn.convolution import CONVOLUTIONS


class InputPyramid(nn.Module):
    r"""What the pooled image adds to the first convolution of every encoder level below the finest.

    .. math:: \mathrm{out}_l = V_l * \mathrm{act}(\mathrm{norm}(U_l * \mathrm{pool}_l(x)))

    The paper concatenates the features :math:`\mathrm{act}(\mathrm{norm}(U_l * \mathrm{pool}_l(x)))` with those that
    come from the finer level, before the level's first convolution. That convolution is linear: a sum of one
    convolution over each of the two parts gives the same numbers and needs no concatenated tensor. Here the part from
    the finer level is the encoder's own strided convolution, and :math:`\mathrm{out}_l` is added to it before the norm.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        features: channels per level, finest first; a level's pooled image gets half as many.
        strides: from each level to the next, along each axis.
        kernel_sizes: per level, along each axis.
        **unit: norm, groups and activation, see :class:`lungkit.nn.blocks.ConvUnit`.

    Shapes:
        x (B, in_channels, \*S), S a multiple of the product of the strides -> one (B, features[l], \*S_l) for each
        level but the finest.

    Source: Abraham and Khan, "A Novel Focal Tversky Loss Function with Improved Attention U-Net for Lesion
    Segmentation", ISBI 2019.

    Example:
        >>> import torch
        >>> from lungkit.nn.pyramid import InputPyramid
        >>> pyramid = InputPyramid(2, 1, (8, 16, 32), strides=((2, 2), (2, 2)), kernel_sizes=((3, 3),) * 3)
        >>> [tuple(out.shape) for out in pyramid(torch.randn(1, 1, 16, 24))]
        [(1, 16, 8, 12), (1, 32, 4, 6)]
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        features: Sequence[int],
        *,
        strides: Sequence[tuple[int, ...]],
        kernel_sizes: Sequence[tuple[int, ...]],
        **unit: Any,
    ) -> None:
        super().__init__()
        self.pools = nn.ModuleList(AVERAGE_POOLS[dims](stride, stride) for stride in strides)
        self.units = nn.ModuleList()
        self.mixes = nn.ModuleList()
        for channels, kernel_size in zip(features[1:], kernel_sizes[1:], strict=True):
            width = max(1, channels // 2)
            if unit.get("norm") == "group":  # the groups have to divide the width
                width = channels
            self.units.append(ConvUnit(dims, in_channels, width, kernel_size=kernel_size, **unit))
            padding = tuple(k // 2 for k in kernel_size)
            self.mixes.append(CONVOLUTIONS[dims](width, channels, kernel_size, padding=padding, bias=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        outs = []
        for pool, unit, mix in zip(self.pools, self.units, self.mixes, strict=True):
            x = pool(x)
            outs.append(mix(unit(x)))
        return outs
