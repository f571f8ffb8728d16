"""Ways to compute the additive attention gate.

The op's providers take x (B, Cx, *S), phi (B, Ci, *Sg) and the weights, and return (out, alpha). Two compiled forms
take part, since neither is the faster one everywhere: with the interpolation compiled too, and with the library's. Both
write psi as multiply and sum, which fuses where a convolution to one channel would not.

``MONAI`` is its AttentionBlock in training mode at equal widths. It does more, because its users pay for more: g comes
at x's size, its projection is made there, and there are three batch norms. Two stand beside it: ``lungkit, MONAI's
form`` computes the same, with the fused tail after the norms, and ``lungkit module`` is ``lungkit.nn.AttentionGate``
with the projection of g, at g's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import OURS, Case, Provider
from torch import Tensor, nn

from lungkit.nn import AttentionGate, MonaiAttentionGate
from lungkit.ops.attention_gate import attention_gate, reference

MONAI_FORM = "lungkit, MONAI's form"

Gate = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def upsample(phi: Tensor, x: Tensor) -> Tensor:
    if phi.shape[2:] == x.shape[2:]:
        return phi
    mode = "bilinear" if x.dim() == 4 else "trilinear"
    return F.interpolate(phi, size=x.shape[2:], mode=mode, align_corners=False)


def tail_form(x: Tensor, up: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor) -> tuple[Tensor, Tensor]:
    """The gate after the interpolation; psi as multiply and sum."""
    ones = (1,) * (x.dim() - 2)
    convolution = F.conv2d if x.dim() == 4 else F.conv3d
    q = F.relu(convolution(x, w_x.to(x.dtype).reshape(*w_x.shape, *ones)) + up)
    psi = (q.float() * w_psi.float().reshape(1, -1, *ones)).sum(1, keepdim=True) + b_psi.float()
    alpha = torch.sigmoid(psi).to(x.dtype)
    return alpha * x, alpha


def whole_form(x: Tensor, phi: Tensor, w_x: Tensor, w_psi: Tensor, b_psi: Tensor) -> tuple[Tensor, Tensor]:
    return tail_form(x, upsample(phi, x), w_x, w_psi, b_psi)


def _compiled_tail() -> Gate:
    tail = torch.compile(tail_form, dynamic=False)
    return lambda x, phi, w_x, w_psi, b_psi: tail(x, upsample(phi, x), w_x, w_psi, b_psi)


GATES: dict[str, Callable[[], Gate]] = {
    OURS: lambda: attention_gate,
    "eager": lambda: reference,
    "compiled": lambda: torch.compile(whole_form, dynamic=False),
    "compiled, library upsampling": _compiled_tail,
}


@dataclass(frozen=True)
class AttentionGateCase(Case):
    """A level of a network: x with phi at half its size, and the gradients of all five arguments."""

    x_channels: int
    inter_channels: int
    size: tuple[int, ...]
    batch: int = 1
    x_dtype: torch.dtype = torch.float32

    op = "attention_gate"

    @property
    def label(self) -> str:
        shape = "x".join(map(str, (self.batch, self.x_channels, *self.size)))
        return f"{shape} Ci={self.inter_channels} {str(self.x_dtype).removeprefix('torch.')}"

    @property
    def providers(self) -> tuple[str, ...]:
        return (*GATES, "lungkit module", MONAI_FORM, "MONAI")

    @property
    def dtype(self) -> torch.dtype:
        return self.x_dtype

    @property
    def coarse(self) -> tuple[int, ...]:
        return tuple((n + 1) // 2 for n in self.size)

    def main_bytes(self) -> int:
        return self.batch * self.x_channels * torch.Size(self.size).numel() * self.x_dtype.itemsize

    def fewest_bytes(self) -> Mapping[str, int]:
        """Forward reads x and phi and writes out and alpha; backward reads x, phi and the gradient of out and writes
        those of x and phi. Alpha is read again. Weights are too small to count."""
        fine, coarse = (self.batch * torch.Size(grid).numel() for grid in (self.size, self.coarse))
        cx, ci, s = self.x_channels, self.inter_channels, self.x_dtype.itemsize
        return {
            "forward": s * (fine * (2 * cx + 1) + coarse * ci),
            "backward": s * (fine * (3 * cx + 1) + coarse * 2 * ci),
        }

    def flops(self) -> Mapping[str, float]:
        """The product W_x x; in the backward once more, with its two gradients."""
        product = 2.0 * self.batch * torch.Size(self.size).numel() * self.x_channels * self.inter_channels
        return {"forward": product, "backward": 3 * product}

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.x_dtype)

        cx, ci = self.x_channels, self.inter_channels
        tensors = {
            "x": draw(self.batch, cx, *self.size),
            "phi": draw(self.batch, ci, *self.coarse),
            "w_x": draw(ci, cx) / cx**0.5,
            "w_psi": draw(ci) / ci**0.5,
            "b_psi": draw(1),
        }
        for tensor in tensors.values():
            tensor.requires_grad_()
        return tensors | {"grad_out": draw(self.batch, cx, *self.size)}

    def build(self, provider: str, inputs: dict[str, Tensor]) -> Provider:
        grad_out = inputs["grad_out"]
        if provider in GATES:
            arguments = tuple(tensor for name, tensor in inputs.items() if name != "grad_out")
            gate = GATES[provider]()
            return Provider(
                lambda: gate(*arguments), lambda r: torch.autograd.grad(r[0], arguments, grad_out)
            )
        x = inputs["x"]
        module, g_shape = self._module(provider)
        module.to(self.device, self.x_dtype)
        g = torch.randn(g_shape, device=self.device).to(self.x_dtype).requires_grad_()
        arguments = (x, g, *module.parameters())
        return Provider(lambda: module(x=x, g=g), lambda out: torch.autograd.grad(out, arguments, grad_out))

    def _module(self, provider: str) -> tuple[nn.Module, tuple[int, ...]]:
        """The module and its gating signal: as wide as x in MONAI's network, twice as wide below x in ours."""
        dims, cx, ci = len(self.size), self.x_channels, self.inter_channels
        if provider == MONAI_FORM:
            return MonaiAttentionGate(dims, ci, cx, cx), (self.batch, cx, *self.size)
        if provider == "MONAI":
            from monai.networks.nets.attentionunet import AttentionBlock

            return AttentionBlock(dims, ci, cx, cx), (self.batch, cx, *self.size)
        return AttentionGate(dims, cx, 2 * cx, ci), (self.batch, 2 * cx, *self.coarse)
