r"""Group or instance norm, residual and leaky ReLU in one op: a block's tail between two convolutions."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lungkit.errors import UsageError
from lungkit.ops._context import autocast_dtype, is_transformed, runs_plainly
from lungkit.ops._layout import new_features
from lungkit.ops._library import define_op, is_native

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int | None = None,
    residual: Tensor | None = None,
    slope: float = 1.0,
    eps: float = 1e-5,
    in_place: bool = False,
) -> Tensor:
    r"""Norm over the voxels of each group of channels, sum with a residual, leaky ReLU.

    .. math::
        y = \mathrm{leaky}\Bigl(\gamma_c \frac{x - \mathrm{E}_g[x]}{\sqrt{\mathrm{Var}_g[x] + \epsilon}}
        + \beta_c + r\Bigr), \qquad \mathrm{leaky}(v) = \begin{cases} v & v > 0 \\ s\,v & \text{else}\end{cases}

    Mean and (biased) variance are taken per image and group in two passes over chunks of the image, in float32 for half
    types and float64 for float64. For backward x and the statistics are kept and, where there is a residual, y, which
    whatever follows keeps anyway; the input's gradient needs one pass for the sums and one to write it.

    Args:
        x: (B, C, \*S) with one to three spatial axes; float64, float32, bfloat16 or float16; channels-first or
            channels-last, which are read as they are.
        weight: gamma, (C,), in x's dtype, or float32 where that is a half type; None is 1.
        bias: beta, likewise; None is 0.
        groups: divides C; None is C, instance norm.
        residual: r, of x's shape and dtype.
        slope: s of the leaky ReLU, at least 0; 1 is no activation, 0 a ReLU.
        eps: added to the variance.
        in_place: let y replace x where no gradient is recorded. x must then be used by nobody else.

    Returns:
        y, in x's shape, dtype and order of memory.

    Raises:
        UsageError: shapes, dtypes, devices or options that do not fit together; the message names both sides.

    Source: Ulyanov et al., "Instance Normalization", 2016; Wu and He, "Group Normalization", 2018; the statistics of
    chunks are combined as in Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983.

    Example:
        >>> import torch
        >>> from lungkit.ops.norm_act import norm_act
        >>> norm_act(torch.tensor([[[1.0, 3.0]]]), slope=0.5, eps=0.0).tolist()
        [[[-0.5, 1.0]]]
    """
    groups = x.shape[1] if groups is None and x.dim() > 1 else groups or 0
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        residual = None if residual is None else residual.to(x.dtype)
    _check(x, weight, bias, residual, groups, slope)
    if not _has_kernel(x):
        return _by_group_norm(x, weight, bias, residual, groups, eps, slope)
    if in_place and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        torch.ops.lungkit.norm_act_(x, weight, bias, residual, groups, eps, slope)
        return x
    is_eager = torch.is_grad_enabled() and type(x) is Tensor and runs_plainly()
    op = _Recorded.apply if is_eager else torch.ops.lungkit.norm_act
    y, _, _ = op(x, weight, bias, residual, groups, eps, slope)
    return cast(Tensor, y)


def _by_group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    slope: float,
) -> Tensor:
    # On a CPU torch's backward pass reads each channel of a channels-last tensor with a stride, ten times slower.
    turned = x.device.type == "cpu" and not x.is_contiguous() and not torch.compiler.is_exporting()
    y = F.group_norm(x.contiguous() if turned else x, groups, weight, bias, eps)
    if turned and x.dim() > 3:
        y = y.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    y = y if residual is None else y + residual
    return y if slope == 1 else F.leaky_relu(y, slope)


def _has_kernel(x: Tensor) -> bool:
    """Whether the op is to be used: elsewhere torch's group norm is faster than the twin, and known to every tool.

    Exported programs run without lungkit, and transforms and forward-mode derivatives are torch's own.
    """
    return x.device.type in _NATIVE and not torch.compiler.is_exporting() and not is_transformed()


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, groups: int, slope: float
) -> None:
    if x.dim() not in (3, 4, 5):
        raise UsageError(f"x must be (B, C, *S) with one to three spatial axes, got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise UsageError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if not 1 <= groups <= max(1, x.shape[1]) or x.shape[1] % groups:
        raise UsageError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    if not 0 <= slope < math.inf:
        raise UsageError(f"slope must be at least 0, got {slope}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != (x.shape[1],):
            raise UsageError(f"{name} must be (C,) = ({x.shape[1]},), got {tuple(parameter.shape)}")
        if parameter.dtype != x.dtype and (parameter.dtype != torch.float32 or x.dtype == torch.float64):
            raise UsageError(
                f"{name} must have x's dtype ({x.dtype}), or float32 where x is a half type, got {parameter.dtype}"
            )
        if parameter.device != x.device:
            raise UsageError(
                f"x and {name} must be on the same device, got {x.device} and {parameter.device}"
            )
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device
    ):
        raise UsageError(
            f"residual must have the shape, dtype and device of x ({tuple(x.shape)}, {x.dtype}, {x.device}), got "
            f"{tuple(residual.shape)}, {residual.dtype}, {residual.device}"
        )


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of the op under :func:`norm_act` in plain PyTorch: y, and mean and rstd (B, groups)."""
    wide = _wide(x)
    rows = wide.reshape(x.shape[0], groups, x.shape[1] // groups * math.prod(x.shape[2:]))
    variance, mean = torch.var_mean(rows, dim=2, correction=0)
    rstd = (variance + eps).rsqrt()
    return _activated(_normalised(wide, mean, rstd), weight, bias, residual, slope).to(x.dtype), mean, rstd


def _wide(x: Tensor) -> Tensor:
    """In the type that sums are taken in."""
    return x if x.dtype == torch.float64 else x.float()


def _normalised(wide: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    rows = wide.reshape(*mean.shape, -1)
    return ((rows - mean.unsqueeze(2)) * rstd.unsqueeze(2)).reshape(wide.shape)


def _by_channel(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.to(like.dtype).reshape(-1, *(1,) * (like.dim() - 2))


def _before_activation(
    normalised: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    if weight is not None:
        normalised = normalised * _by_channel(weight, normalised)
    if bias is not None:
        normalised = normalised + _by_channel(bias, normalised)
    return normalised if residual is None else normalised + residual


def _activated(
    normalised: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, slope: float
) -> Tensor:
    value = _before_activation(normalised, weight, bias, residual)
    return value if slope == 1 else torch.where(value > 0, value, value * slope)


def _reference_in_place(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    slope: float,
) -> None:
    x.copy_(reference(x, weight, bias, residual, groups, eps, slope)[0])


def _reference_backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normalised = _normalised(_wide(x), mean, rstd)
    sign = _before_activation(normalised, weight, bias, None) if y is None else y
    wide = _wide(grad_y)
    gradient = wide if slope == 1 else torch.where(sign > 0, wide, wide * slope)
    voxels = tuple(range(2, x.dim()))
    by_weight = gradient if weight is None else gradient * _by_channel(weight, gradient)
    rows, hats = by_weight.reshape(*mean.shape, -1), normalised.reshape(*mean.shape, -1)
    centred = rows - rows.mean(2, keepdim=True) - hats * (rows * hats).mean(2, keepdim=True)
    grad_x = (centred * rstd.unsqueeze(2)).reshape(x.shape).to(x.dtype)
    empty = x.new_empty(0)
    grad_weight = empty if weight is None else (gradient * normalised).sum((0, *voxels)).to(weight.dtype)
    grad_bias = empty if bias is None else gradient.sum((0, *voxels)).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, gradient.to(x.dtype) if needs_residual else empty


define_op(
    "norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int groups, float eps, float slope)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    reference,
)
define_op(
    "norm_act_(Tensor(a!) x, Tensor? weight, Tensor? bias, Tensor? residual, int groups, float eps, float slope) -> ()",
    _reference_in_place,
)
define_op(
    "norm_act_backward(Tensor grad_y, Tensor x, Tensor? y, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias,"
    " float slope, bool needs_residual)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    _reference_backward,
)


_NATIVE = frozenset(backend for backend in ("cpu", "cuda") if is_native("norm_act", backend))


@torch.library.register_fake("lungkit::norm_act")
def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty((x.shape[0], groups), dtype=sums)
    return new_features(x), mean, torch.empty_like(mean)


@torch.library.register_fake("lungkit::norm_act_")
def _fake_in_place(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    slope: float,
) -> None:
    return None


@torch.library.register_fake("lungkit::norm_act_backward")
def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = x.new_empty(0)
    return (
        new_features(x),
        empty if weight is None else torch.empty_like(weight),
        empty if bias is None else torch.empty_like(bias),
        new_features(x) if needs_residual else x.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, _, _, slope = inputs
    y, mean, rstd = output
    # Beside a residual x alone does not tell which side of the activation a voxel was on; y does.
    ctx.save_for_backward(x, None if residual is None else y, mean, rstd, weight, bias)
    ctx.slope = slope
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    if grad_y is None:
        return nothing
    x, y, mean, rstd, weight, bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    grad_x, grad_weight, grad_bias, grad_residual = torch.ops.lungkit.norm_act_backward(
        grad_y, x, y, mean, rstd, weight, bias, ctx.slope, needs_residual
    )
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        grad_residual if needs_residual else None,
        *nothing[4:],
    )


torch.library.register_autograd("lungkit::norm_act", _backward, setup_context=_setup)


class _Recorded(torch.autograd.Function):
    """The same formula without what torch.library does around it, which takes longer than a small norm."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output = cast(tuple[Tensor, Tensor, Tensor], torch.ops.lungkit.norm_act(*inputs))
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # towards a second derivative, which the op refuses
            return _backward(ctx, *gradients)
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(ctx, *gradients)


def _raise_on_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(
        "norm_act has no second derivative; use reference of lungkit.ops.norm_act where one is needed"
    )


torch.library.register_autograd("lungkit::norm_act_backward", _raise_on_double_backward)
