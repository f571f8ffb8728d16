"""Convolutions that a CPU computes by the fastest of its libraries: for a single image too, and channels-last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lungkit.ops._context import runs_plainly

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
"""The memory format by the number of spatial axes."""

_SHALLOW, _PLANE = 16, 4096


def _plain_dtype(layer: _ConvNd, x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What torch would compute ``layer(x)`` in, itself and at once, on a CPU; None where it would do something else."""
    # Compilers and exporters choose for themselves, and modes and transforms know torch's own convolution alone. Asked
    # first: sizes may not be known to them.
    is_plain = (
        runs_plainly()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dim() == weight.dim()
        and x.numel() > 0
        and layer.padding_mode == "zeros"
    )
    if not is_plain:
        return None
    if torch.is_autocast_enabled("cpu") and {x.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}:
        return torch.get_autocast_dtype("cpu")
    return x.dtype if x.dtype == weight.dtype else None


def _is_by_voxel(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=CHANNELS_LAST[x.dim() - 2])


def _convolved(layer: _ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The convolution by another road than torch's; None where torch's choice is good.

    On one thread torch leaves 1x1 kernels to a loop that turns channels-last features over and back: of volumes five to
    seven times the time of one product of matrices. It also leaves float32 batches of one to that loop unless B C S1 S2
    is over 20480, the last axis of a volume not being counted: most levels of a 3D network that predicts window by
    window. oneDNN does them.
    """
    if isinstance(layer.padding, str):
        return None
    dtype = _plain_dtype(layer, x, weight)
    if dtype == torch.bfloat16 and torch.is_grad_enabled() and weight.requires_grad and _overflows(layer, x):
        return _convolved_in_parts(layer, x, weight, bias)
    if dtype != torch.float32:
        return None
    if math.prod(layer.kernel_size) == 1:
        is_product = layer.groups == math.prod(layer.stride) == 1 and not any(layer.padding)
        fits = is_product and _is_by_voxel(x) and x.shape[1] == weight.shape[1]
        if not fits or torch.get_num_threads() > 1:
            return None
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    if len(x) > 1 or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    return torch.mkldnn_convolution(
        x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups
    )


def _output_size(layer: _ConvNd, size: Sequence[int]) -> list[int]:
    sides = zip(size, layer.kernel_size, layer.stride, map(int, layer.padding), layer.dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]


def _overflows(layer: _ConvNd, x: Tensor) -> bool:
    """Whether oneDNN may write past its workspace in the gradient of the weights of this convolution in bfloat16.

    With AMX it does (torch 2.13) where the output has few slices of a large plane: 8 of 96 x 96 with 16 channels by 58
    KB, 12 of 100 x 512 with 32. None was found among 16 slices and more, planes of up to 4096 voxels, and in 2D.
    """
    if x.dim() != 5 or math.prod(layer.kernel_size) == 1:
        return False
    depth, *sides = _output_size(layer, x.shape[2:])
    plane = math.prod(sides)
    return plane > _PLANE and depth < max(_SHALLOW, plane // 2048)


def _convolved_in_parts(layer: _ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution, some rows of every slice at a time."""
    _, rows, columns = _output_size(layer, x.shape[2:])
    reach = layer.dilation[1] * (layer.kernel_size[1] - 1) + 1
    stride, (depth, padding, width) = layer.stride[1], map(int, layer.padding)
    padded = F.pad(x, (0, 0, padding, padding))
    step = max(1, _PLANE // columns)
    parts = [
        F.conv3d(
            padded.narrow(3, first * stride, (min(step, rows - first) - 1) * stride + reach),
            weight, bias, layer.stride, (depth, 0, width), layer.dilation, layer.groups,
        )
        for first in range(0, rows, step)
    ]  # fmt: skip
    return torch.cat(parts, dim=3)


def _enlarged(layer: _ConvNd, x: Tensor) -> Tensor | None:
    """A transposed convolution whose kernel is its stride as one product, each voxel becoming a block of the output.

    Its gradients are up to three times as fast as torch's, in float32 and bfloat16. None where it is another one, x is
    not channels-last, or no gradients are wanted: torch's own is then as fast, and needs less memory.
    """
    weight, bias, size = layer.weight, layer.bias, layer.kernel_size
    is_block = (
        size == layer.stride
        and layer.groups == math.prod(layer.dilation) == 1
        and not any(layer.padding)
        and not any(layer.output_padding)
    )
    fits = (
        is_block
        and _plain_dtype(layer, x, weight) in (torch.float32, torch.bfloat16)
        and _is_by_voxel(x)
        and x.shape[1] == weight.shape[0]
    )
    if not fits or not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return None
    dims, channels = len(size), weight.shape[1]
    kernel = weight.movedim(1, -1).flatten(1).t()
    blocks = F.linear(x.movedim(1, -1), kernel, None if bias is None else bias.repeat(math.prod(size)))
    blocks = blocks.view(*blocks.shape[:-1], *size, channels)
    order = [axis for d in range(dims) for axis in (1 + d, 1 + dims + d)]
    whole = [n * s for n, s in zip(x.shape[2:], size, strict=True)]
    return blocks.permute(0, *order, -1).reshape(len(x), *whole, channels).movedim(-1, 1)


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d`, up to several times faster for a single small float32 image on a CPU.

    Example:
        >>> Conv2d(1, 4, 3, padding=1)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = _convolved(self, x, weight, bias)
        return super()._conv_forward(x, weight, bias) if found is None else found


class Conv3d(nn.Conv3d):
    """:class:`torch.nn.Conv3d`, up to several times faster on a CPU for a single float32 volume, or on one thread.

    Example:
        >>> Conv3d(1, 4, 3, padding=1)(torch.zeros(1, 1, 8, 8, 8)).shape
        torch.Size([1, 4, 8, 8, 8])
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = _convolved(self, x, weight, bias)
        return super()._conv_forward(x, weight, bias) if found is None else found


class ConvTranspose2d(nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d`, faster on a CPU for channels-last features where the kernel is the stride.

    Example:
        >>> ConvTranspose2d(4, 2, 2, stride=2)(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 2, 16, 16])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        found = _enlarged(self, input) if output_size is None else None
        return super().forward(input, output_size) if found is None else found


class ConvTranspose3d(nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d`, faster on a CPU for channels-last features where the kernel is the stride.

    Example:
        >>> ConvTranspose3d(4, 2, 2, stride=2)(torch.zeros(1, 4, 8, 8, 8)).shape
        torch.Size([1, 2, 16, 16, 16])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        found = _enlarged(self, input) if output_size is None else None
        return super().forward(input, output_size) if found is None else found


CONVOLUTIONS: dict[int, Any] = {2: Conv2d, 3: Conv3d}
TRANSPOSED_CONVOLUTIONS: dict[int, Any] = {2: ConvTranspose2d, 3: ConvTranspose3d}
