"""Random parameters of a batch, the same on every device."""

from __future__ import annotations

import math

import torch


class Draws:
    """Random numbers for the ``count`` samples of a batch, from a CPU generator.

    Every call consumes the same amount of the generator's stream whatever comes out, so that one transform's
    probability does not change what the others draw.
    """

    def __init__(self, count: int, generator: torch.Generator | None) -> None:
        self._count = count
        self._generator = generator

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """float64 (count, \\*shape), uniform in [low, high)."""
        sample = torch.rand((self._count, *shape), generator=self._generator, dtype=torch.float64)
        return low + (high - low) * sample

    def log_uniform(self, low: float, high: float) -> torch.Tensor:
        """float64 (count,), its logarithm uniform in [log low, log high)."""
        return self.uniform(math.log(low), math.log(high)).exp()

    def events(self, probability: float, *shape: int) -> torch.Tensor:
        """bool (count, \\*shape), True with the given probability; never at 0, always at 1."""
        return self.uniform(0.0, 1.0, *shape) < probability

    def seed(self) -> int:
        """A seed for a generator on another device."""
        return int(torch.randint(2**62, (), generator=self._generator))


def indices_of(drawn: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Positions of True in a CPU mask, on ``device``; no synchronisation with the device."""
    return drawn.nonzero().flatten().to(device, non_blocking=True)


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(n,) values on the device and in the type of ``like`` (n, C, \\*S), shaped to broadcast over it."""
    return values.to(like.device, like.dtype, non_blocking=True).view(-1, *(1,) * (like.ndim - 1))
