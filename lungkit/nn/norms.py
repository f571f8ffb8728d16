"""Normalisation layers by name, and an instance norm that is fast in both memory layouts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lungkit.errors import UsageError
from lungkit.nn.convolution import CHANNELS_LAST

BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NORMS = ("instance", "batch", "group", "none")


class InstanceNorm(nn.GroupNorm):
    r"""Instance norm in 2D and 3D: a group norm with one channel per group.

    .. math::
        y = \gamma \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} + \beta

    with mean and (biased) variance over the voxels of each image and channel. Parameters have the names and
    shapes of ``nn.InstanceNorm2d``, and the numbers are the same.

    ``nn.InstanceNorm`` runs on CPU as a batch norm over B x C channels and copies channels-last input; the group
    norm is several times faster. Its backward pass for channels-last input on CPU reads each channel with a
    stride, ten times slower than need be, so that case has a backward pass of its own here.

    Args:
        channels: C.
        eps: added to the variance.
        affine: learn gamma and beta; without, they are 1 and 0.

    Shapes:
        (B, C, \*S) -> (B, C, \*S), in the memory layout of the input.

    Source: Ulyanov et al., "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016.

    Example:
        >>> import torch
        >>> from lungkit.nn.norms import InstanceNorm
        >>> y = InstanceNorm(3)(5 + 2 * torch.randn(2, 3, 64, 64))
        >>> bool(y.mean().abs() < 1e-4), bool((y.std() - 1).abs() < 1e-3)
        (True, True)
    """

    def __init__(self, channels: int, eps: float = 1e-5, *, affine: bool = True) -> None:
        super().__init__(channels, channels, eps=eps, affine=affine)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and _is_slow_in_backward(input):
            return _ChannelsLastInstanceNorm.apply(input, self.weight, self.bias, self.eps)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _is_slow_in_backward(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.is_contiguous():
        return False
    layout = CHANNELS_LAST.get(x.dim() - 2)
    return layout is not None and x.is_contiguous(memory_format=layout)


class _ChannelsLastInstanceNorm(torch.autograd.Function):
    """Group norm with one channel per group, with a backward pass that reads channels-last tensors in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        batch, channels = x.shape[:2]
        voxels = math.prod(x.shape[2:])
        y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, voxels, channels, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        voxels = math.prod(x.shape[2:])
        # Sums over the voxels as products with a row of ones: accurate, and read in memory order.
        rows, gradient_rows = (t.movedim(1, -1).flatten(1, -2) for t in (x, dy))
        ones = x.new_ones(x.shape[0], 1, voxels)
        sum_dy = torch.bmm(ones, gradient_rows)[:, 0]
        sum_dy_x = torch.bmm(ones, gradient_rows * rows)[:, 0]
        sum_dy_xhat = (sum_dy_x - mean * sum_dy) * rstd
        # dx = gamma rstd (dy - mean(dy) - xhat mean(dy xhat)), arranged as a dy + b x + c.
        a = rstd if weight is None else weight * rstd
        b = -a * rstd * sum_dy_xhat / voxels
        c = -a * sum_dy / voxels - b * mean
        a, b, c = (t.reshape(*t.shape, *(1,) * (x.dim() - 2)) for t in (a, b, c))
        dx = torch.addcmul(c, x, b).addcmul_(dy, a)
        if weight is None:
            return dx, None, None, None
        return dx, sum_dy_xhat.sum(0), sum_dy.sum(0), None


def make_norm(norm: str, dims: int, channels: int, *, groups: int = 8) -> nn.Module:
    """Normalisation layer by name.

    Args:
        norm: "instance", "batch", "group" or "none".
        dims: 2 or 3.
        channels: channels of the tensor to normalise.
        groups: number of groups of the group norm; divides ``channels``.

    Raises:
        UsageError: unknown ``norm``, or ``groups`` that does not divide ``channels``.

    Source: Ulyanov et al., "Instance Normalization", 2016; Wu and He, "Group Normalization", 2018;
    Ioffe and Szegedy, "Batch Normalization", 2015.

    Example:
        >>> from lungkit.nn.norms import make_norm
        >>> make_norm("group", 2, 16, groups=4).num_groups
        4
    """
    if norm == "instance":
        return InstanceNorm(channels)
    if norm == "batch":
        return BATCH_NORMS[dims](channels)
    if norm == "group":
        if channels % groups:
            raise UsageError(
                f"groups must divide the channels of every level, got {groups} for {channels} channels"
            )
        return nn.GroupNorm(groups, channels)
    if norm == "none":
        return nn.Identity()
    raise UsageError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
