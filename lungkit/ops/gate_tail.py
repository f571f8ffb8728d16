r"""The tail of an attention gate whose projections were computed before it: the library's product, a norm.

:func:`gate_psi` and :func:`gate_scale` are each one pass over the features forward and one backward, where eager
PyTorch takes three and one, and six and three. Between them stands whatever the gate does to its map, such as a
bias or a norm, at the price of a map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lungkit.errors import UsageError
from lungkit.ops._context import autocast_dtype, is_transformed
from lungkit.ops._layout import new_features
from lungkit.ops._library import define_op


def gate_psi(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    r"""The map of an additive attention gate before its sigmoid, without its bias.

    .. math:: \psi = \sum_c w_c\, \mathrm{relu}(a_c + b_c)

    Args:
        a: projected features (B, C, \*S), 2D or 3D; float64, float32, bfloat16 or float16.
        b: projected gating signal, a's shape and dtype.
        weight: (C,), in a's dtype, or float32 where that is a half type.

    Returns:
        psi (B, 1, \*S) in a's dtype. The relu's result is kept for backward, in place of a and b.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit together; the message names both sides.

    Example:
        >>> import torch
        >>> from lungkit.ops.gate_tail import gate_psi
        >>> a = torch.tensor([1.0, -3.0]).reshape(1, 2, 1, 1)
        >>> gate_psi(a, torch.ones(1, 2, 1, 1), torch.tensor([0.5, 7.0])).item()
        1.0
    """
    dtype = autocast_dtype(a)
    if dtype is not None:
        a, b = a.to(dtype), b.to(dtype)
    _check_features("a", a)
    if b.shape != a.shape:
        raise UsageError(f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    _check_together("a", a, "b", b)
    if weight.dim() != 1 or weight.shape[0] != a.shape[1]:
        raise UsageError(
            f"weight must be (C,) = ({a.shape[1]},) from a's channels, got {tuple(weight.shape)}"
        )
    if weight.dtype != a.dtype and (weight.dtype != torch.float32 or a.dtype == torch.float64):
        raise UsageError(
            f"weight must have a's dtype ({a.dtype}), or float32 where a is a half type, got {weight.dtype}"
        )
    if weight.device != a.device:
        raise UsageError(f"a and weight must be on the same device, got {a.device} and {weight.device}")
    psi, _ = (reference_psi if is_transformed() else torch.ops.lungkit.gate_psi)(a, b, weight)
    return psi


def gate_scale(x: Tensor, alpha: Tensor) -> Tensor:
    r"""Features times their attention map, ``alpha * x``; backward gives both gradients in one pass.

    Args:
        x: features (B, C, \*S), 2D or 3D; float64, float32, bfloat16 or float16.
        alpha: map (B, 1, \*S), x's dtype.

    Returns:
        (B, C, \*S) in x's dtype.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit together; the message names both sides.

    Example:
        >>> import torch
        >>> from lungkit.ops.gate_tail import gate_scale
        >>> gate_scale(torch.ones(1, 3, 2, 2), torch.full((1, 1, 2, 2), 0.5)).sum().item()
        6.0
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, alpha = x.to(dtype), alpha.to(dtype)
    _check_features("x", x)
    if alpha.shape != (x.shape[0], 1, *x.shape[2:]):
        raise UsageError(
            f"alpha must be (B, 1, *S) = {(x.shape[0], 1, *x.shape[2:])} for x, got {tuple(alpha.shape)}"
        )
    _check_together("x", x, "alpha", alpha)
    return reference_scale(x, alpha) if is_transformed() else torch.ops.lungkit.gate_scale(x, alpha)


def _check_features(name: str, features: Tensor) -> None:
    if features.dim() not in (4, 5):
        raise UsageError(f"{name} must be (B, C, Y, X) or (B, C, Z, Y, X), got shape {tuple(features.shape)}")
    if features.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"{name} must be float64, float32, bfloat16 or float16, got {features.dtype}")


def _check_together(first: str, a: Tensor, other: str, b: Tensor) -> None:
    if a.dtype != b.dtype:
        raise UsageError(f"{first} and {other} must have the same dtype, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise UsageError(f"{first} and {other} must be on the same device, got {a.device} and {b.device}")


def reference_psi(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of the op under :func:`gate_psi`, in plain PyTorch: psi and the relu's result."""
    q = F.relu(a + b)
    convolution = F.conv2d if a.dim() == 4 else F.conv3d
    return convolution(q, weight.to(a.dtype).reshape(1, -1, *(1,) * (a.dim() - 2))), q


def reference_scale(x: Tensor, alpha: Tensor) -> Tensor:
    """Twin of :func:`gate_scale` in plain PyTorch."""
    return alpha * x


def _reference_psi_backward(
    grad_psi: Tensor, q: Tensor, weight: Tensor, needs_features: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_features, grad_weight = q.new_empty(0), weight.new_empty(0)
    if needs_features:
        column = weight.to(q.dtype).reshape(-1, *(1,) * (q.dim() - 2))
        grad_features = torch.where(q <= 0, 0, grad_psi * column)
    if needs_weight:
        grad_weight = torch.einsum("bcv,bv->c", q.flatten(2), grad_psi.flatten(1)).to(weight.dtype)
    return grad_features, grad_weight


def _reference_scale_backward(
    grad_out: Tensor, x: Tensor, alpha: Tensor, needs_x: bool, needs_alpha: bool
) -> tuple[Tensor, Tensor]:
    return (
        alpha * grad_out if needs_x else x.new_empty(0),
        (grad_out * x).sum(1, keepdim=True) if needs_alpha else x.new_empty(0),
    )


define_op("gate_psi(Tensor a, Tensor b, Tensor weight) -> (Tensor psi, Tensor q)", reference_psi)
define_op(
    "gate_psi_backward(Tensor grad_psi, Tensor q, Tensor weight, bool needs_features, bool needs_weight)"
    " -> (Tensor grad_features, Tensor grad_weight)",
    _reference_psi_backward,
)
define_op("gate_scale(Tensor x, Tensor alpha) -> Tensor", reference_scale)
define_op(
    "gate_scale_backward(Tensor grad_out, Tensor x, Tensor alpha, bool needs_x, bool needs_alpha)"
    " -> (Tensor grad_x, Tensor grad_alpha)",
    _reference_scale_backward,
)


def _new_map(features: Tensor) -> Tensor:
    return features.new_empty((features.shape[0], 1, *features.shape[2:]))


@torch.library.register_fake("lungkit::gate_psi")
def _fake_psi(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _new_map(a), new_features(a)


@torch.library.register_fake("lungkit::gate_psi_backward")
def _fake_psi_backward(
    grad_psi: Tensor, q: Tensor, weight: Tensor, needs_features: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        new_features(q) if needs_features else q.new_empty(0),
        weight.new_empty(weight.shape if needs_weight else (0,)),
    )


@torch.library.register_fake("lungkit::gate_scale")
def _fake_scale(x: Tensor, alpha: Tensor) -> Tensor:
    return new_features(x)


@torch.library.register_fake("lungkit::gate_scale_backward")
def _fake_scale_backward(
    grad_out: Tensor, x: Tensor, alpha: Tensor, needs_x: bool, needs_alpha: bool
) -> tuple[Tensor, Tensor]:
    return new_features(x) if needs_x else x.new_empty(0), _new_map(x) if needs_alpha else x.new_empty(0)


def _setup_psi(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2])
    ctx.set_materialize_grads(False)


def _backward_psi(ctx: Any, grad_psi: Tensor | None, grad_q: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_psi is None:
        return None, None, None
    needs = ctx.needs_input_grad
    grad_features, grad_weight = torch.ops.lungkit.gate_psi_backward(
        grad_psi, *ctx.saved_tensors, needs[0] or needs[1], needs[2]
    )
    # a and b are summed: one gradient serves both.
    return (
        grad_features if needs[0] else None,
        grad_features if needs[1] else None,
        grad_weight if needs[2] else None,
    )


def _setup_scale(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_scale(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    gradients = torch.ops.lungkit.gate_scale_backward(grad_out, *ctx.saved_tensors, needs[0], needs[1])
    return tuple(grad if needed else None for grad, needed in zip(gradients, needs, strict=True))


torch.library.register_autograd("lungkit::gate_psi", _backward_psi, setup_context=_setup_psi)
torch.library.register_autograd("lungkit::gate_scale", _backward_scale, setup_context=_setup_scale)


def _raise_on_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(
        "the tail of the attention gate has no second derivative; use reference_psi and reference_scale of"
        " lungkit.ops.gate_tail where one is needed"
    )


torch.library.register_autograd("lungkit::gate_psi_backward", _raise_on_double_backward)
torch.library.register_autograd("lungkit::gate_scale_backward", _raise_on_double_backward)
