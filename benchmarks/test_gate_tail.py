"""The gate's tail at deep levels and, as MONAI's form needs it in training, at every one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from gate_tail_providers import GateTailCase, eager_tail, fused_tail

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16


def tails(selection: str, device: str, threads: tuple[int, ...]) -> list[GateTailCase]:
    """ "smoke" runs in seconds, "default" in minutes, "full" in hours."""
    if selection == "smoke":
        return [GateTailCase(device, threads[0], 8, 4, (9, 9, 9), 1, _BF16)]
    levels = [((32, 16), 96), ((128, 64), 24), ((256, 128), 12), ((512, 256), 8)]
    dtypes = (_F32, _BF16, _F16) if selection == "full" else (_F32, _BF16)
    counts = threads if selection == "full" else threads[:1]
    return [
        GateTailCase(device, count, *widths, (edge,) * 3, 2, dtype, last)
        for count, (widths, edge), dtype, last in product(counts, levels, dtypes, (False, True))
    ]


@pytest.mark.cases(of=tails)
def test_gate_tail(report: Callable[..., None], case: GateTailCase, mode: str, provider: str) -> None:
    report(case, mode, provider)


@pytest.mark.parametrize("channels_last", [False, True])
def test_providers_solve_the_same_problem(channels_last: bool) -> None:
    case = GateTailCase("cpu", 1, 8, 4, (5, 6, 7), 2, channels_last=channels_last)
    arguments = [tensor for name, tensor in case.inputs().items() if name != "grad"]
    torch.testing.assert_close(fused_tail(*arguments), eager_tail(*arguments))
