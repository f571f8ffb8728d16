"""A case whose needs of memory are known, for the tests of the harness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from harness import COMPILED, Case, Provider
from torch import Tensor

MIB = 2**20


@dataclass(frozen=True)
class HeldMemory(Case):
    """Takes scratch twice as large as what it returns; the gradient is as large as the input."""

    op = "held_memory"
    label = "16 MiB"
    providers = ("scratch", "missing")

    def inputs(self) -> Tensor:
        return torch.ones(4 * MIB, requires_grad=True)

    def fewest_bytes(self) -> Mapping[str, int]:
        return {"forward": 32 * MIB, "backward": 32 * MIB}

    def build(self, provider: str, inputs: Tensor) -> Provider:
        if provider == "missing":
            raise ImportError("No module named 'missing'", name="missing")
        if COMPILED in provider:
            raise AssertionError("expected stride 1\nof an operator")

        def forward() -> Tensor:
            scratch = bytearray(b"x") * (32 * MIB)  # by malloc, which torch's own counters do not see
            return inputs * len(scratch)

        return Provider(forward, lambda out: torch.autograd.grad(out.sum(), inputs))
