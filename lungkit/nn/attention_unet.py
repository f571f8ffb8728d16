"""Attention U-Net in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lungkit.nn import _options
from lungkit.nn.attention_gate import SIGNALS, AttentionGate
from lungkit.nn.blocks import initialise, seeded
from lungkit.nn.unet import UNet

# sigmoid(2) = 0.88: gates start nearly open, and where the sigmoid still has a slope.
_OPEN_GATE_BIAS = 2.0


class AttentionUNet(UNet):
    r"""U-Net whose skip connections pass an additive attention gate driven by the next coarser decoder level.

    .. math::
        \alpha_l = \mathrm{sigmoid}(w_\psi \cdot \mathrm{relu}(W_x x_l + \mathrm{up}(W_g g_{l+1} + b)) + b_\psi)

    The skip features :math:`x_l` of level l enter the decoder as :math:`\alpha_l x_l`; the gating signal
    :math:`g_{l+1}` is the decoder's output one level below (the bottleneck at the coarsest gate).
    Gates start nearly open (alpha about 0.88), so that training begins close to a plain U-Net.

    Args:
        dims: as in :class:`UNet`, and so are all arguments not named here.
        in_channels: channels of the image.
        out_channels: K, classes of the logits.
        inter_channels: inner width of the gates: None for half the channels of the level, an integer, or one
            per skip connection, finest first.
        gate_finest: gate the finest skip too. The paper leaves that one out, since its features are not yet
            deep; it is also the map with the most detail to look at.
        gate_heads: attention maps per gate.
        gate_combine: how several heads become one: "mean" or "concat".
        gate_output_norm: "batch" or "instance" adds the output projection of the paper's grid gate; None does not.
        gate_signal: "local" as above, "global" (g pooled over the whole patch) or "both", see :class:`AttentionGate`.
        gate: "auto" computes the gates by the fused op where it is available, "reference" in plain PyTorch.
        seed: as in :class:`UNet`; the weights that both networks have are then equal too.
        **options: the further options of :class:`UNet`.

    Shapes:
        x (B, in_channels, \*S) -> logits (B, K, \*S), or a tuple in training with ``deep_supervision``.
        ``return_attention=True`` gives ``(logits, maps)``: one map (B, gate_heads, \*S_l) per gate in [0, 1],
        finest first, at the size of its level.

    Raises:
        UsageError: an argument out of range, or an input that does not fit: the message names it.

    Source: Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", 2018.

    Example:
        >>> import torch
        >>> from lungkit.nn import AttentionUNet
        >>> network = AttentionUNet(2, features=(8, 16, 32)).eval()
        >>> logits, maps = network(torch.randn(1, 1, 32, 32), return_attention=True)
        >>> logits.shape, [tuple(alpha.shape) for alpha in maps]
        (torch.Size([1, 2, 32, 32]), [(1, 1, 32, 32), (1, 1, 16, 16)])
    """

    name = "attention-unet"

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        inter_channels: int | Sequence[int] | None = None,
        gate_finest: bool = True,
        gate_heads: int = 1,
        gate_combine: Literal["mean", "concat"] = "mean",
        gate_output_norm: Literal["batch", "instance"] | None = None,
        gate_signal: Literal["local", "global", "both"] = "local",
        gate: Literal["auto", "reference"] = "auto",
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dims, in_channels, out_channels, seed=seed, **options)
        skips = len(self.features) - 1
        inner: list[int | None] = [None] * skips
        if inter_channels is not None:
            inner = list(_options.per_level("inter_channels", inter_channels, levels=skips))
        gate_options: dict[str, Any] = {
            "heads": _options.check_integer("gate_heads", gate_heads),
            "combine": _options.check_choice("gate_combine", gate_combine, ("mean", "concat")),
            "output_norm": _options.check_choice(
                "gate_output_norm", gate_output_norm, (None, "batch", "instance")
            ),
            "signal": _options.check_choice("gate_signal", gate_signal, SIGNALS),
            "implementation": _options.check_choice("gate", gate, ("auto", "reference")),
        }
        self._first_gate = 0 if gate_finest else 1
        # The gates draw after, and apart from, the rest: with one seed both networks start from the same weights.
        with seeded(None if seed is None else seed + 1):
            gates = [
                AttentionGate(
                    self.dims, self.features[level], self.features[level + 1], inner[level], **gate_options
                )
                for level in range(self._first_gate, skips)
            ]
            for module in gates:
                module.apply(initialise)
                if module.psi.bias is not None:
                    nn.init.constant_(module.psi.bias, _OPEN_GATE_BIAS)
        self.gates = nn.ModuleList(gates)
        self._config |= {
            "inter_channels": None if inter_channels is None else inner,
            "gate_finest": bool(gate_finest),
            **{f"gate_{key}": value for key, value in gate_options.items() if key != "implementation"},
            "gate": gate,
        }

    def _gate(self, level: int, skip: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        if level < self._first_gate:
            return skip, None
        return self.gates[level - self._first_gate](skip, g, return_attention=True)
