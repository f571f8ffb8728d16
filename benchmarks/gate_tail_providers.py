"""Ways to compute the tail of an attention gate whose projections are there: the map's sum, sigmoid and product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import OURS, Case, Provider
from torch import Tensor

from lungkit.ops.gate_tail import gate_psi, gate_scale

Tail = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fused_tail(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return gate_scale(x, torch.sigmoid(gate_psi(a, b, weight)))


def eager_tail(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """As MONAI's AttentionBlock writes it: a convolution to one channel."""
    convolution = F.conv2d if x.dim() == 4 else F.conv3d
    psi = convolution(F.relu(a + b), weight.reshape(1, -1, *(1,) * (a.dim() - 2)))
    return torch.sigmoid(psi) * x


TAILS: dict[str, Callable[[], Tail]] = {
    OURS: lambda: fused_tail,
    "eager": lambda: eager_tail,
    "compiled": lambda: torch.compile(eager_tail, dynamic=False),
}


@dataclass(frozen=True)
class GateTailCase(Case):
    """A level of a network: x with Cx channels, the two projections with Ci."""

    x_channels: int
    inter_channels: int
    size: tuple[int, ...]
    batch: int = 1
    x_dtype: torch.dtype = torch.float32
    channels_last: bool = False

    op = "gate_tail"

    @property
    def label(self) -> str:
        shape = "x".join(map(str, (self.batch, self.x_channels, *self.size)))
        order = " channels-last" if self.channels_last else ""
        return f"{shape} Ci={self.inter_channels} {str(self.x_dtype).removeprefix('torch.')}{order}"

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(TAILS)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_dtype

    def _voxel_bytes(self, elements: int) -> int:
        return self.batch * torch.Size(self.size).numel() * elements * self.x_dtype.itemsize

    def main_bytes(self) -> int:
        return self._voxel_bytes(self.x_channels)

    def fewest_bytes(self) -> Mapping[str, int]:
        """Forward reads x and both projections, and writes out, alpha and the relu's result. Backward reads these but
        out, and its gradient, and writes the gradients of x and of the projections, which are one."""
        cx, ci = self.x_channels, self.inter_channels
        return {
            "forward": self._voxel_bytes(2 * cx + 3 * ci + 1),
            "backward": self._voxel_bytes(3 * cx + 2 * ci + 1),
        }

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        order = torch.channels_last if len(self.size) == 2 else torch.channels_last_3d

        def draw(channels: int) -> Tensor:
            shape = (self.batch, channels, *self.size)
            tensor = torch.randn(shape, generator=generator, device=self.device).to(self.x_dtype)
            return tensor.contiguous(memory_format=order) if self.channels_last else tensor

        ci = self.inter_channels
        weight = torch.randn(ci, generator=generator, device=self.device).to(self.x_dtype) / ci**0.5
        tensors = {"x": draw(self.x_channels), "a": draw(ci), "b": draw(ci), "weight": weight}
        for tensor in tensors.values():
            tensor.requires_grad_()
        return tensors | {"grad": draw(self.x_channels)}

    def build(self, provider: str, inputs: dict[str, Tensor]) -> Provider:
        tail = TAILS[provider]()
        arguments = tuple(tensor for name, tensor in inputs.items() if name != "grad")
        return Provider(
            lambda: tail(*arguments), lambda out: torch.autograd.grad(out, arguments, inputs["grad"])
        )
