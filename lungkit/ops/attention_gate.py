r"""Additive attention gate: one attention map, applied to the skip features it was computed from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lungkit.errors import UsageError

_INTERPOLATION = {2: "bilinear", 3: "trilinear"}


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
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, phi = x.to(dtype), phi.to(dtype)
    _check_arguments(x, phi, w_x, w_psi, b_psi)
    return reference(x, phi, w_x, w_psi, b_psi)


def reference(x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of :func:`attention_gate` in plain PyTorch: same arguments, same result, any device."""
    axes = (1,) * (x.dim() - 2)
    weight = w_x.to(x.dtype).reshape(*w_x.shape, *axes)
    convolution = F.conv2d if len(axes) == 2 else F.conv3d
    theta = convolution(x, weight)
    up = phi
    if phi.shape[2:] != x.shape[2:]:
        up = F.interpolate(phi, size=x.shape[2:], mode=_INTERPOLATION[len(axes)], align_corners=False)
    q = F.relu(theta + up)
    psi = convolution(q, w_psi.to(x.dtype).reshape(1, -1, *axes), b_psi.to(x.dtype))
    alpha = torch.sigmoid(psi)
    return alpha * x, alpha


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
