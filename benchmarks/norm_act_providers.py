"""Ways to compute instance norm, leaky ReLU and the sum with a residual between two convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import OURS, Case, Provider
from torch import Tensor

from lungkit.ops.norm_act import norm_act

SLOPE = 0.01
NormAct = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def group_norm_form(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """Group norm with one channel a group: torch's fastest instance norm."""
    y = F.group_norm(x, x.shape[1], weight, bias)
    return F.leaky_relu_(y if residual is None else y + residual, SLOPE)


def instance_norm_form(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """``F.instance_norm``, as ``nn.InstanceNorm3d`` in MONAI's and nnU-Net's blocks calls it."""
    y = F.instance_norm(x, weight=weight, bias=bias)
    return F.leaky_relu_(y if residual is None else y + residual, SLOPE)


FORMS: dict[str, Callable[[], NormAct]] = {
    OURS: lambda: lambda x, weight, bias, residual: norm_act(x, weight, bias, residual=residual, slope=SLOPE),
    "group norm, eager": lambda: group_norm_form,
    "group norm, compiled": lambda: torch.compile(group_norm_form, dynamic=False),
    "MONAI, nnU-Net (instance norm, eager)": lambda: instance_norm_form,
}


@dataclass(frozen=True)
class NormActCase(Case):
    """Features of a level; weight and bias are float32, as autocast leaves them."""

    shape: tuple[int, ...]
    x_dtype: torch.dtype = torch.float32
    channels_last: bool = False
    with_residual: bool = False

    op = "norm_act"

    @property
    def label(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.x_dtype).removeprefix("torch.")]
        parts += ["channels-last" if self.channels_last else "channels-first"]
        return " ".join(parts + (["residual"] if self.with_residual else []))

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(FORMS)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_dtype

    def main_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.x_dtype.itemsize

    def fewest_bytes(self) -> Mapping[str, int]:
        """Forward reads x and writes y; backward reads the gradient and x and writes x's. A residual is read as well,
        and its gradient written."""
        main = self.main_bytes()
        return {"forward": main * (2 + self.with_residual), "backward": main * (3 + self.with_residual)}

    def inputs(self) -> dict[str, Tensor | None]:
        generator = torch.Generator(self.device).manual_seed(0)

        def draw() -> Tensor:
            tensor = torch.randn(self.shape, generator=generator, device=self.device).to(self.x_dtype)
            if self.channels_last:
                order = torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d
                tensor = tensor.contiguous(memory_format=order)
            return tensor

        channels = self.shape[1]
        return {
            "x": draw().requires_grad_(),
            "weight": torch.ones(channels, device=self.device).requires_grad_(),
            "bias": torch.zeros(channels, device=self.device).requires_grad_(),
            "residual": draw().requires_grad_() if self.with_residual else None,
            "grad": draw(),
        }

    def build(self, provider: str, inputs: dict[str, Tensor | None]) -> Provider:
        form = FORMS[provider]()
        x, weight, bias, residual = (inputs[name] for name in ("x", "weight", "bias", "residual"))
        asked = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
        # torch's norms want parameters of the features' type.
        same = provider == OURS or self.x_dtype == torch.float32

        def forward() -> Tensor:
            if same:
                return form(x, weight, bias, residual)
            return form(x, weight.to(self.x_dtype), bias.to(self.x_dtype), residual)

        return Provider(forward, lambda y: torch.autograd.grad(y, asked, inputs["grad"]))
