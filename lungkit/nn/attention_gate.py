"""Attention gates for skip connections: the additive gate of Attention U-Net, and the form MONAI trains."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.nn.convolution import CONVOLUTIONS
from lungkit.ops.attention_gate import attention_gate, reference
from lungkit.ops.gate_tail import gate_psi, gate_scale, reference_psi, reference_scale

_NORMS: dict[str, dict[int, Any]] = {
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
}

SIGNALS = ("local", "global", "both")

Implementation = Literal["auto", "reference"]
_Gate = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_IMPLEMENTATIONS: dict[str, _Gate] = {"auto": attention_gate, "reference": reference}


class AttentionGate(nn.Module):
    r"""Additive attention gate on skip features, driven by a coarser gating signal.

    .. math::
        q = \mathrm{relu}(W_x x + \mathrm{up}(W_g g + b)), \qquad
        \alpha = \mathrm{sigmoid}(w_\psi \cdot q + b_\psi), \qquad
        \mathrm{out} = \alpha\, x

    :math:`W_g g + b` is computed at g's own grid and interpolated linearly to x's.

    Args:
        dims: 2 or 3 spatial axes.
        x_channels: Cx, channels of the skip features.
        g_channels: Cg, channels of the gating signal.
        inter_channels: Ci, inner width; None means max(1, Cx // 2).
        heads: number of attention maps, each with projections of its own.
        combine: how several heads become one output: "mean" multiplies x by the mean of the maps;
            "concat" concatenates the gated features of the heads and projects them back to Cx.
        output_norm: "batch" or "instance" adds the output projection of Oktay's grid gate, a 1x1 convolution
            followed by that norm; None leaves the gated features as they are.
        signal: "local" is g as above; "global" pools g over the whole patch first, one vector an image, so that each
            voxel of x is weighed against what the patch holds, at next to no cost; "both" sums the two,
            :math:`W_g g + W_c \overline{g} + b`.
        implementation: "auto" takes the fused op where it is available, "reference" plain PyTorch.

    Shapes:
        x (B, Cx, \*S), g (B, Cg, \*Sg) with Sg at most S along each axis -> out (B, Cx, \*S);
        with ``return_attention`` also the maps alpha (B, heads, \*S).

    Raises:
        UsageError: an argument that is out of range, or tensors that do not fit together.

    Source: Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", 2018;
    several heads as in Schlemper et al., "Attention gated networks", 2019; a global vector as the signal as in
    Jetley et al., "Learn to Pay Attention", ICLR 2018.

    Example:
        >>> import torch
        >>> from lungkit.nn import AttentionGate
        >>> gate = AttentionGate(3, x_channels=8, g_channels=16)
        >>> out, alpha = gate(torch.randn(1, 8, 6, 6, 6), torch.randn(1, 16, 3, 3, 3), return_attention=True)
        >>> out.shape, alpha.shape
        (torch.Size([1, 8, 6, 6, 6]), torch.Size([1, 1, 6, 6, 6]))
    """

    def __init__(
        self,
        dims: int,
        x_channels: int,
        g_channels: int,
        inter_channels: int | None = None,
        *,
        heads: int = 1,
        combine: Literal["mean", "concat"] = "mean",
        output_norm: Literal["batch", "instance"] | None = None,
        signal: Literal["local", "global", "both"] = "local",
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        if dims not in CONVOLUTIONS:
            raise UsageError(f"dims must be 2 or 3, got {dims}")
        if signal not in SIGNALS:
            raise UsageError(f"signal must be one of {', '.join(map(repr, SIGNALS))}, got {signal!r}")
        if heads < 1:
            raise UsageError(f"heads must be at least 1, got {heads}")
        if combine not in ("mean", "concat"):
            raise UsageError(f"combine must be 'mean' or 'concat', got {combine!r}")
        if output_norm is not None and output_norm not in _NORMS:
            raise UsageError(f"output_norm must be one of {sorted(_NORMS)} or None, got {output_norm!r}")
        convolution = CONVOLUTIONS[dims]
        inner = max(1, x_channels // 2) if inter_channels is None else inter_channels
        self.heads = heads
        self.combine = combine
        self.signal = signal
        self.implementation = implementation
        self._gate = _select(implementation)
        # Heads lie side by side along the channels: one convolution serves g for all of them.
        self.W_x = convolution(x_channels, heads * inner, kernel_size=1, bias=False)
        self.W_g = convolution(g_channels, heads * inner, kernel_size=1)
        self.W_c = (
            convolution(g_channels, heads * inner, kernel_size=1, bias=False) if signal == "both" else None
        )
        self.psi = convolution(heads * inner, heads, kernel_size=1, groups=heads)
        concatenated = heads > 1 and combine == "concat"
        layers: list[nn.Module] = []
        if concatenated or output_norm is not None:
            layers.append(convolution(x_channels * (heads if concatenated else 1), x_channels, kernel_size=1))
        if output_norm is not None:
            layers.append(_NORMS[output_norm][dims](x_channels, affine=True))
        self.output = nn.Sequential(*layers)

    def forward(
        self, x: Tensor, g: Tensor, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        phi = self._projected_signal(g).chunk(self.heads, dim=1)
        w_x = self.W_x.weight.flatten(1).chunk(self.heads)
        w_psi = self.psi.weight.flatten(1)
        b_psi = self.psi.bias.split(1)
        gated, maps = zip(
            *(self._gate(x, phi[h], w_x[h], w_psi[h], b_psi[h]) for h in range(self.heads)), strict=True
        )
        if self.heads == 1:
            out = gated[0]
        elif self.combine == "concat":
            out = torch.cat(gated, dim=1)
        else:
            out = torch.stack(gated).mean(0)
        out = self.output(out)
        return (out, torch.cat(maps, dim=1)) if return_attention else out

    def _projected_signal(self, g: Tensor) -> Tensor:
        if self.signal == "local":
            return self.W_g(g)
        pooled = g.mean(tuple(range(2, g.dim())), keepdim=True)
        return self.W_g(pooled) if self.W_c is None else self.W_g(g) + self.W_c(pooled)


class MonaiAttentionGate(nn.Module):
    r"""MONAI's ``AttentionBlock``, computed by fused ops.

    .. math::
        \alpha = \mathrm{sigmoid}(\mathrm{BN}(w_\psi \cdot \mathrm{relu}(\mathrm{BN}(W_g g + b_g) +
        \mathrm{BN}(W_x x + b_x)) + b_\psi)), \qquad \mathrm{out} = \alpha\, x

    Parameters and buffers carry MONAI's names, so its state dict loads as it is. In evaluation mode the three
    batch norms are affine maps with fixed numbers: they fold into the weights of the fused gate. In training
    mode each norm needs the statistics of a whole tensor: the projections and their norms are the library's,
    what follows them is the fused tail (:mod:`lungkit.ops.gate_tail`), with psi's norm between its two halves.

    Args:
        dims: 2 or 3 spatial axes.
        f_int: Ci, inner width.
        f_g: channels of the gating signal.
        f_l: channels of the skip features x.
        dropout: taken for the sake of MONAI's signature; its block applies none.
        implementation: "auto" takes the fused ops where they are available, "reference" plain PyTorch.

    Shapes:
        g (B, f_g, \*S), x (B, f_l, \*S) -> out (B, f_l, \*S);
        with ``return_attention`` also alpha (B, 1, \*S).

    Source: MONAI 1.6.1, ``monai.networks.nets.attentionunet.AttentionBlock``.

    Example:
        >>> import torch
        >>> from lungkit.nn import MonaiAttentionGate
        >>> gate = MonaiAttentionGate(2, f_int=4, f_g=8, f_l=8).eval()
        >>> gate(torch.randn(1, 8, 5, 5), torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(
        self,
        dims: int,
        f_int: int,
        f_g: int,
        f_l: int,
        dropout: float = 0.0,
        *,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        if dims not in CONVOLUTIONS:
            raise UsageError(f"dims must be 2 or 3, got {dims}")
        self._gate = _select(implementation)
        fused = implementation == "auto"
        self._psi: Callable[[Tensor, Tensor, Tensor], Tensor] = gate_psi if fused else _plain_psi
        self._scale: Callable[[Tensor, Tensor], Tensor] = gate_scale if fused else reference_scale
        self.W_g = _projection(dims, f_g, f_int)
        self.W_x = _projection(dims, f_l, f_int)
        self.psi = _projection(dims, f_int, 1)
        self.psi.append(nn.Sigmoid())

    def forward(
        self, g: Tensor, x: Tensor, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.training:
            out, alpha = self._train(g, x)
        else:
            out, alpha = self._folded(g, x)
        return (out, alpha) if return_attention else out

    def _train(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        (convolution,), norm, sigmoid = cast(Any, self.psi)
        psi = self._psi(self.W_g(g), self.W_x(x), convolution.weight.flatten())
        alpha = sigmoid(norm(psi + convolution.bias.to(psi.dtype)))
        return self._scale(x, alpha), alpha

    def _folded(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        w_g, b_g = _fold(self.W_g)
        w_x, b_x = _fold(self.W_x)
        w_psi, b_psi = _fold(self.psi)
        # Both projections are summed before the relu: x's bias may as well be added at g's side.
        convolve = F.conv2d if g.dim() == 4 else F.conv3d
        phi = convolve(g, w_g, b_g + b_x)
        return self._gate(x, phi, w_x.flatten(1), w_psi.flatten(), b_psi)


def _projection(dims: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution and batch norm under the parameter names that MONAI gives them."""
    convolution = CONVOLUTIONS[dims](in_channels, out_channels, kernel_size=1)
    return nn.Sequential(
        nn.Sequential(OrderedDict(conv=convolution)),
        _NORMS["batch"][dims](out_channels),
    )


def _fold(projection: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals convolution plus batch norm with running statistics."""
    convolution: Any = projection[0].conv
    norm: Any = projection[1]
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    bias = scale * (convolution.bias - norm.running_mean) + norm.bias
    return convolution.weight * scale.reshape(-1, *(1,) * (convolution.weight.dim() - 1)), bias


def _plain_psi(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return reference_psi(a, b, weight)[0]


def _select(implementation: str) -> _Gate:
    if implementation not in _IMPLEMENTATIONS:
        raise UsageError(f"implementation must be one of {sorted(_IMPLEMENTATIONS)}, got {implementation!r}")
    return _IMPLEMENTATIONS[implementation]
