"""Sums over the ranks of a distributed run, differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lungkit.errors import UsageError


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward.

    Every rank computes the same loss from the sum, so the gradient of the sum of the ranks' losses reaches each rank's
    own statistics: `world size` times the loss's. DistributedDataParallel averages over ranks, which undoes the factor.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``values`` summed over the ranks of ``group`` (None: all), each of which must call this."""
    check_process_group()
    return _SumOverRanks.apply(values, group)


def sums_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """Each of ``values`` summed over all ranks, in one message."""
    total = sum_over_ranks(torch.cat([value.flatten() for value in values]))
    parts = total.split([value.numel() for value in values])
    return tuple(part.view(value.shape) for part, value in zip(parts, values, strict=True))


def check_process_group() -> None:
    """Raise where there are no ranks to sum over."""
    if not dist.is_available() or not dist.is_initialized():
        raise UsageError(
            "synchronise=True needs torch.distributed: call torch.distributed.init_process_group first, or pass "
            "synchronise=False in a run of one process"
        )
