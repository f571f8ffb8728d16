r"""Additive attention gate: one attention map, applied to the skip features it was computed from.

Which path computes it:

- On the CPU the native kernels, for every shape and dtype.
- On CUDA the native kernels for up to 64 channels of x and 32 inner ones, where a run of voxels and the sums of the
  weights' gradients fit on the chip: the half types from compute capability 8.0 on, float32 where the device has the
  shared memory for its backward pass (compute capability 7.5 has it up to 32 and 16 channels). Tensor cores multiply
  the half types, and float32 where ``torch.backends.cuda.matmul.fp32_precision`` is "tf32" (or ``allow_tf32`` is set,
  or ``torch.set_float32_matmul_precision("high")``); otherwise its products are full float32.
- Wider levels have few voxels, and their product is large enough for the library: there CUDA takes the library's
  product and the fused tail of :mod:`lungkit.ops.gate_tail`, as it does for float64.
- Everywhere else, and where no native library is built, the twin in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lungkit.errors import UsageError
from lungkit.ops._context import autocast_dtype, is_transformed
from lungkit.ops._layout import is_channels_last, new_features
from lungkit.ops._library import define_op
from lungkit.ops.gate_tail import gate_psi, gate_scale


def attention_gate(
    x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Gate skip features with an additive attention map.

    .. math::
        q = \mathrm{relu}(W_x x + \mathrm{up}(\phi)), \qquad
        \alpha = \mathrm{sigmoid}(w_\psi \cdot q + b_\psi), \qquad
        \mathrm{out} = \alpha\, x

    ``up`` is linear interpolation to x's grid (``align_corners=False``; the identity on equal grids).

    Args:
        x: skip features (B, Cx, \*S), 2D or 3D; float64, float32, bfloat16 or float16.
        phi: projected gating signal (B, Ci, \*Sg), x's dtype; each axis of Sg at most the same axis of S.
        w_x: weight of the 1x1 convolution on x, (Ci, Cx), in x's dtype, or float32 where x is a half type.
        w_psi: weight of the 1x1 convolution to the map, (Ci,), dtype of ``w_x``.
        b_psi: bias of the map, (1,), dtype of ``w_x``.

    Returns:
        ``(out, alpha)``: gated features (B, Cx, \*S) and attention map (B, 1, \*S), both in x's dtype.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit together; the message names both sides.

    Source: Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", 2018.

    Example:
        >>> import torch
        >>> from lungkit.ops.attention_gate import attention_gate
        >>> x, phi = torch.ones(1, 4, 8, 8), torch.zeros(1, 2, 4, 4)
        >>> out, alpha = attention_gate(x, phi, torch.zeros(2, 4), torch.ones(2), torch.zeros(1))
        >>> out.shape, alpha.shape, float(alpha.mean())
        (torch.Size([1, 4, 8, 8]), torch.Size([1, 1, 8, 8]), 0.5)
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, phi = x.to(dtype), phi.to(dtype)
    _check_arguments(x, phi, w_x, w_psi, b_psi)
    if is_transformed():
        return reference(x, phi, w_x, w_psi, b_psi)
    if x.is_cuda and not _fits_cuda_kernel(x, phi):
        return _product_and_tail(x, phi, w_x, w_psi, b_psi)
    if x.is_cuda and x.dtype == torch.float32 and _allows_tf32():
        return torch.ops.lungkit.attention_gate(x, phi, w_x, w_psi, b_psi, allow_tf32=True)
    return torch.ops.lungkit.attention_gate(x, phi, w_x, w_psi, b_psi)


# As in csrc/attention_gate/cuda.cu and cuda_tile.h.
_CUDA_X_CHANNELS, _CUDA_INNER_CHANNELS = 64, 32
_CUDA_LONGEST_AXIS = 0x7FFF
_CUDA_MOST_VOXELS = 0x7FFFFFFF - 128


def _fits_cuda_kernel(x: Tensor, phi: Tensor) -> bool:
    device = torch.cuda.get_device_properties(x.device)
    shared_bytes = device.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs lack it
    return _fits_device(x, phi, 10 * device.major + device.minor, shared_bytes)


def _fits_device(x: Tensor, phi: Tensor, capability: int, shared_bytes: int) -> bool:
    """Whether a device with this compute capability (86: 8.6) and shared memory a block runs the native kernels."""
    if x.dtype == torch.float32:
        fits = shared_bytes >= _float_shared_bytes(x.shape[1], phi.shape[1])
    else:
        fits = x.dtype in (torch.bfloat16, torch.float16) and capability >= 80
    return (
        fits
        and x.shape[1] <= _CUDA_X_CHANNELS
        and phi.shape[1] <= _CUDA_INNER_CHANNELS
        and max(x.shape[2:]) <= _CUDA_LONGEST_AXIS
        and math.prod(x.shape[2:]) <= _CUDA_MOST_VOXELS
    )


def _float_shared_bytes(x_channels: int, inner: int) -> int:
    """The least that a block of the backward pass in float32 works with: GateBackwardShared, and 8 cells of planes."""
    rows, depth = -(-x_channels // 16) * 16, -(-inner // 16) * 16
    tiles = 4 * (depth * (rows + 4) + (2 * rows + depth) * 132)
    return tiles + 128 * 32 + 4 * depth + 16 + 8 * (8 * inner + 4) + 32


def _allows_tf32() -> bool:
    # It knows whatever was set by any of torch's three settings; `allow_tf32` raises once a newer one was used.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _product_and_tail(
    x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor
) -> tuple[Tensor, Tensor]:
    """The library's products, then the fused tail."""
    psi = gate_psi(_product(x, w_x), _upsample_by_products(phi, x), w_psi)
    alpha = torch.sigmoid(psi + b_psi.to(psi.dtype))
    return gate_scale(x, alpha), alpha


def reference(x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of :func:`attention_gate` in plain PyTorch: same arguments, same result, any device."""
    _, alpha = _attend(x, phi, w_x, w_psi, b_psi)
    return alpha * x, alpha


def _attend(x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor) -> tuple[Tensor, Tensor]:
    """``(q, alpha)`` of the formula."""
    q = F.relu(_pointwise(x, w_x) + _upsample(phi, x))
    return q, torch.sigmoid(_pointwise(q, w_psi[None], b_psi))


def _upsample(phi: Tensor, x: Tensor) -> Tensor:
    """phi at x's grid."""
    if phi.shape[2:] == x.shape[2:]:
        return phi
    mode = "bilinear" if x.dim() == 4 else "trilinear"
    return F.interpolate(phi, size=x.shape[2:], mode=mode, align_corners=False)


def _upsample_by_products(phi: Tensor, x: Tensor) -> Tensor:
    """phi at x's grid, one matrix product an axis.

    On CUDA the gradient of F.interpolate is added up by atomics in any order; that of a product always in the same.
    """
    fine = phi.to(torch.promote_types(phi.dtype, torch.float32))
    # A tensor of a graph that is being captured belongs to that graph, one of a trace to that trace.
    kept = not (torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()))
    for axis, size in enumerate(x.shape[2:], start=2):
        if fine.shape[axis] != size:
            make = _interpolation if kept else _interpolation.__wrapped__
            weights = make(fine.shape[axis], size, fine.dtype, fine.device)
            fine = (fine.movedim(axis, -1) @ weights).movedim(-1, axis)
    return fine.to(x.dtype)


@lru_cache(maxsize=64)
def _interpolation(coarse: int, fine: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights (coarse, fine) of linear interpolation along an axis; making them anew is most of what the host does."""
    with torch.inference_mode(False):  # a later call may need gradients
        points = torch.eye(coarse, dtype=dtype, device=device)[None]
        return F.interpolate(points, size=fine, mode="linear", align_corners=False)[0]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """The 1x1 convolution as a matrix product, which rounds as torch's settings for products say."""
    weight = weight.to(x.dtype)
    if is_channels_last(x):
        return F.linear(x.movedim(1, -1), weight).movedim(-1, 1)
    return torch.matmul(weight, x.flatten(2)).unflatten(2, x.shape[2:])


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution with weight (out, in), in x's dtype."""
    convolution = F.conv2d if x.dim() == 4 else F.conv3d
    weight = weight.to(x.dtype).reshape(*weight.shape, *(1,) * (x.dim() - 2))
    return convolution(x, weight, None if bias is None else bias.to(x.dtype))


def _reference_backward(
    grad_out: Tensor | None,
    grad_alpha: Tensor | None,
    x: Tensor,
    phi: Tensor,
    w_x: Tensor,
    w_psi: Tensor,
    b_psi: Tensor,
    needs_x: bool,
    needs_phi: bool,
    needs_w_x: bool,
    needs_psi: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Twin of the backward op. Written out: autograd does not reach below the dispatcher."""
    q, alpha = _attend(x, phi, w_x, w_psi, b_psi)
    total = torch.zeros_like(alpha) if grad_alpha is None else grad_alpha
    if grad_out is not None:
        total = total + (grad_out * x).sum(1, keepdim=True)
    grad_psi = alpha * (1 - alpha) * total
    grad_theta = torch.where(q > 0, _pointwise(grad_psi, w_psi[:, None]), 0)

    grad_x = grad_phi = grad_w_x = grad_w_psi = grad_b_psi = x.new_empty(0)
    if needs_x:
        grad_x = _pointwise(grad_theta, w_x.t())
        if grad_out is not None:
            grad_x = grad_x + alpha * grad_out
    if needs_phi:
        grad_phi = grad_theta
        if phi.shape != grad_theta.shape:
            upsample = torch.ops.aten.upsample_bilinear2d_backward
            if x.dim() == 5:
                upsample = torch.ops.aten.upsample_trilinear3d_backward
            grad_phi = upsample(grad_theta, x.shape[2:], phi.shape, align_corners=False)
    if needs_w_x:
        grad_w_x = torch.einsum("biv,bcv->ic", grad_theta.flatten(2), x.flatten(2)).to(w_x.dtype)
    if needs_psi:
        grad_w_psi = torch.einsum("biv,bv->i", q.flatten(2), grad_psi.flatten(1)).to(w_x.dtype)
        grad_b_psi = grad_psi.sum().reshape(1).to(w_x.dtype)
    return grad_x, grad_phi, grad_w_x, grad_w_psi, grad_b_psi


def _check_arguments(x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor) -> None:
    if x.dim() not in (4, 5):
        raise UsageError(f"x must be (B, Cx, Y, X) or (B, Cx, Z, Y, X), got shape {tuple(x.shape)}")
    if phi.dim() != x.dim():
        raise UsageError(f"x and phi must have the same number of axes, got {x.dim()} and {phi.dim()}")
    if phi.shape[0] != x.shape[0]:
        raise UsageError(f"x and phi must have the same batch size, got {x.shape[0]} and {phi.shape[0]}")
    if any(coarse > fine for coarse, fine in zip(phi.shape[2:], x.shape[2:], strict=True)):
        raise UsageError(
            f"phi's grid must not be finer than x's, got {tuple(phi.shape[2:])} for x {tuple(x.shape[2:])}"
        )
    if phi.numel() == 0 and x.numel() != 0:
        raise UsageError(f"phi of shape {tuple(phi.shape)} is empty but x of shape {tuple(x.shape)} is not")
    if w_x.dim() != 2 or w_x.shape[0] != phi.shape[1] or w_x.shape[1] != x.shape[1]:
        raise UsageError(
            f"w_x must be (Ci, Cx) = ({phi.shape[1]}, {x.shape[1]}) from the channels of phi and x, "
            f"got {tuple(w_x.shape)}"
        )
    if w_psi.dim() != 1 or w_psi.shape[0] != phi.shape[1]:
        raise UsageError(
            f"w_psi must be (Ci,) = ({phi.shape[1]},) from phi's channels, got {tuple(w_psi.shape)}"
        )
    if b_psi.dim() != 1 or b_psi.shape[0] != 1:
        raise UsageError(f"b_psi must be (1,), got {tuple(b_psi.shape)}")
    _check_types(x, phi, w_x, w_psi, b_psi)


def _check_types(x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor) -> None:
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if phi.dtype != x.dtype:
        raise UsageError(f"x and phi must have the same dtype, got {x.dtype} and {phi.dtype}")
    if w_x.dtype != x.dtype and (w_x.dtype != torch.float32 or x.dtype == torch.float64):
        raise UsageError(
            f"w_x must have x's dtype ({x.dtype}), or float32 where x is a half type, got {w_x.dtype}"
        )
    for name, tensor in (("w_psi", w_psi), ("b_psi", b_psi)):
        if tensor.dtype != w_x.dtype:
            raise UsageError(f"w_x and {name} must have the same dtype, got {w_x.dtype} and {tensor.dtype}")
    for name, tensor in (("phi", phi), ("w_x", w_x), ("w_psi", w_psi), ("b_psi", b_psi)):
        if tensor.device != x.device:
            raise UsageError(f"x and {name} must be on the same device, got {x.device} and {tensor.device}")


def _twin(
    x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor, allow_tf32: bool = False
) -> tuple[Tensor, Tensor]:
    return reference(x, phi, w_x, w_psi, b_psi)


define_op(
    "attention_gate(Tensor x, Tensor phi, Tensor w_x, Tensor w_psi, Tensor b_psi, bool allow_tf32=False)"
    " -> (Tensor out, Tensor alpha)",
    _twin,
)
define_op(
    "attention_gate_backward(Tensor? grad_out, Tensor? grad_alpha, Tensor x, Tensor phi, Tensor w_x, Tensor w_psi,"
    " Tensor b_psi, bool needs_x, bool needs_phi, bool needs_w_x, bool needs_psi, bool allow_tf32=False)"
    " -> (Tensor grad_x, Tensor grad_phi, Tensor grad_w_x, Tensor grad_w_psi, Tensor grad_b_psi)",
    _reference_backward,
)


@torch.library.register_fake("lungkit::attention_gate")
def _fake(
    x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor, allow_tf32: bool = False
) -> tuple[Tensor, Tensor]:
    _check_arguments(x, phi, w_x, w_psi, b_psi)
    return new_features(x), x.new_empty((x.shape[0], 1, *x.shape[2:]))


@torch.library.register_fake("lungkit::attention_gate_backward")
def _fake_backward(
    grad_out: Tensor | None,
    grad_alpha: Tensor | None,
    x: Tensor,
    phi: Tensor,
    w_x: Tensor,
    w_psi: Tensor,
    b_psi: Tensor,
    needs_x: bool,
    needs_phi: bool,
    needs_w_x: bool,
    needs_psi: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = w_x.new_empty
    return (
        new_features(x) if needs_x else none(0),
        new_features(phi) if needs_phi else none(0),
        w_x.new_empty(w_x.shape) if needs_w_x else none(0),
        w_x.new_empty(w_psi.shape) if needs_psi else none(0),
        w_x.new_empty(b_psi.shape) if needs_psi else none(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_alpha: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad  # of the arguments as they were given: five or six
    if grad_out is None and grad_alpha is None:
        return (None,) * len(needs)
    gradients = torch.ops.lungkit.attention_gate_backward(
        grad_out,
        grad_alpha,
        *ctx.saved_tensors,
        needs[0],
        needs[1],
        needs[2],
        needs[3] or needs[4],
        *ctx.options,
    )
    return tuple(grad if needed else None for grad, needed in zip_longest(gradients, needs))


torch.library.register_autograd("lungkit::attention_gate", _backward, setup_context=_setup_context)


def _raise_on_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(
        "attention_gate has no second derivative; use lungkit.ops.attention_gate.reference where one is needed"
    )


torch.library.register_autograd("lungkit::attention_gate_backward", _raise_on_double_backward)


@register_flop_formula(torch.ops.lungkit.attention_gate)
def _flops(
    x_shape: Sequence[int], phi_shape: Sequence[int], w_x_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    """The two products, counted as ``torch.utils.flop_counter`` counts convolutions of size 1."""
    inner, channels = w_x_shape
    return 2 * x_shape[0] * math.prod(x_shape[2:]) * inner * (channels + 1)


@register_flop_formula(torch.ops.lungkit.attention_gate_backward)
def _flops_backward(
    grad_out_shape: Any,
    grad_alpha_shape: Any,
    x_shape: Any,
    phi_shape: Any,
    w_x_shape: Any,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * _flops(x_shape, phi_shape, w_x_shape)
