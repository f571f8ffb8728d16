"""Convolutions that a CPU computes by its fast library for a single image too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lungkit.ops._context import runs_plainly


def _forward(layer: _ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The convolution by oneDNN where torch would take its own slow loop; None where torch's choice is good.

    torch leaves float32 batches of one to that loop unless B C S1 S2 is over 20480, the last axis of a volume not
    being counted: most levels of a 3D network that predicts window by window. 1x1 kernels are fast in either.
    """
    # Compilers and exporters choose for themselves, and modes and transforms know torch's own convolution alone. Asked
    # first: the sizes below may not be known to them.
    if isinstance(layer.padding, str) or not runs_plainly() or type(x) is not Tensor:
        return None
    slow = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == weight.dim()
        and len(x) == 1
        and x.numel() > 0
        and math.prod(layer.kernel_size) > 1
        and layer.padding_mode == "zeros"
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
    if not slow:
        return None
    return torch.mkldnn_convolution(
        x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups
    )


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d`, up to several times faster for a single small float32 image on a CPU.

    Example:
        >>> Conv2d(1, 4, 3, padding=1)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = _forward(self, x, weight, bias)
        return super()._conv_forward(x, weight, bias) if found is None else found


class Conv3d(nn.Conv3d):
    """:class:`torch.nn.Conv3d`, up to several times faster for a single float32 volume on a CPU.

    Example:
        >>> Conv3d(1, 4, 3, padding=1)(torch.zeros(1, 1, 8, 8, 8)).shape
        torch.Size([1, 4, 8, 8, 8])
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = _forward(self, x, weight, bias)
        return super()._conv_forward(x, weight, bias) if found is None else found


CONVOLUTIONS: dict[int, Any] = {2: Conv2d, 3: Conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
"""The memory format by the number of spatial axes."""

TRANSPOSED_CONVOLUTIONS: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
