"""Learning rate over a run, and the running average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lungkit.errors import UsageError


def learning_rate_factor(
    step: int,
    total_steps: int | None,
    *,
    schedule: str,
    warmup_steps: int = 0,
    share: float | None = None,
) -> float:
    r"""Factor on the peak learning rate at ``step`` of ``total_steps``.

    With :math:`t` = step / total, or ``share`` where the run is given a time and not steps
    (:class:`lungkit.training.time_budget.Pace`): polynomial :math:`(1 - t)^{0.9}` (Isensee et al. 2021), cosine
    :math:`(1 + \cos \pi t)/2` (Loshchilov and Hutter 2017), or 1; times (step + 1) / (warmup + 1) during warm-up.

    Raises:
        UsageError: an unknown schedule, or neither ``total_steps`` nor ``share``.

    Example:
        >>> [round(learning_rate_factor(s, 10, schedule="polynomial", warmup_steps=1), 2) for s in (0, 1, 5, 9)]
        [0.5, 0.91, 0.54, 0.13]
    """
    if share is None and total_steps is None:
        raise UsageError("give total_steps or share; there is no schedule without an end")
    t = step / total_steps if share is None and total_steps is not None else share or 0.0
    factors = {"polynomial": (1 - t) ** 0.9, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}
    if schedule not in factors:
        raise UsageError(f"schedule is {schedule!r}; choose one of {', '.join(factors)}")
    return factors[schedule] * min(1.0, (step + 1) / (warmup_steps + 1))


class WeightAverage:
    r"""Exponential moving average of a network's parameters and of the running statistics of its norms.

    .. math:: a \leftarrow d\,a + (1 - d)\,w, \qquad d = \min(\text{decay}, (1 + n)/(10 + n))

    so that the average of a short run is not held back by its first weights. Statistics of the last few steps would be
    those of other weights than the averaged ones; counts are copied. Source: Tarvainen and Valpola, "Mean teachers are
    better role models", 2017.

    Args:
        network: the network that is trained; updates follow this one.
        decay: d of a long run; 0 takes the weights as they are.

    ``network`` of the average is a copy that holds the averaged weights: what is validated and kept.

    Example:
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> average = WeightAverage(layer, decay=0.5)
        >>> _ = torch.nn.init.ones_(layer.weight)
        >>> average.update(updates=100)
        >>> average.network.weight.item()
        0.5
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network)
        # To collect them from a network of a hundred modules takes longer than to average them.
        self._weights: list[Tensor] = list(network.parameters())
        self._averages: list[Tensor] = list(self.network.parameters())
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self, *, updates: int) -> None:
        """Move the average towards the weights; ``updates`` counts the updates before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        average_buffers(self._buffers, decay)


def average_buffers(pairs: Iterable[tuple[Tensor, Tensor]], decay: float) -> None:
    """Move each buffer towards its second one; whole numbers, which count something, are taken over."""
    for average, value in pairs:
        if average.is_floating_point():
            average.lerp_(value, 1 - decay)
        else:
            average.copy_(value)


def parameter_groups(network: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Optimiser groups: weights of convolutions decay, biases and norms do not."""
    parameters: Iterable[nn.Parameter] = [p for p in network.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
