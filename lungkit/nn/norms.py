"""Normalisation layers by name; group and instance norm by the fused op."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.ops.norm_act import norm_act

BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NORMS = ("instance", "batch", "group", "none")


class GroupNorm(nn.GroupNorm):
    r"""Group norm, together with the leaky ReLU and the sum that may follow it: :func:`lungkit.ops.norm_act`.

    Parameters have the names and shapes of ``nn.GroupNorm``, and the numbers are the same; half features stay half,
    with statistics in float32.

    Args:
        groups: groups of channels.
        channels: C, a multiple of ``groups``.
        eps: added to the variance.
        affine: learn gamma and beta; without, they are 1 and 0.

    Shapes:
        (B, C, \*S) -> (B, C, \*S), in the memory layout of the input.

    Source: Wu and He, "Group Normalization", 2018.

    Example:
        >>> import torch
        >>> from lungkit.nn.norms import GroupNorm
        >>> norm, x, other = GroupNorm(2, 4), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
        >>> expected = torch.nn.functional.leaky_relu(norm(x) + other, 0.1)
        >>> bool(torch.allclose(norm(x, slope=0.1, residual=other), expected, atol=1e-5))
        True
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, *, affine: bool = True) -> None:
        super().__init__(groups, channels, eps=eps, affine=affine)

    def forward(
        self, input: Tensor, *, slope: float = 1.0, residual: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        """leaky(norm(input) + residual), see :func:`lungkit.ops.norm_act`."""
        return norm_act(
            input,
            self.weight,
            self.bias,
            groups=self.num_groups,
            residual=residual,
            slope=slope,
            eps=self.eps,
            in_place=in_place,
        )


class InstanceNorm(GroupNorm):
    r"""Instance norm in 2D and 3D: a group norm with one channel per group.

    .. math::
        y = \gamma \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} + \beta

    with mean and (biased) variance over the voxels of each image and channel. Parameters have the names and
    shapes of ``nn.InstanceNorm2d``, and the numbers are the same.

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
        super().__init__(channels, channels, eps, affine=affine)


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
        return GroupNorm(groups, channels)
    if norm == "none":
        return nn.Identity()
    raise UsageError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
