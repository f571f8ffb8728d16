"""The attention gate at the levels of a network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from attention_gate_providers import (
    GATES,
    AttentionGateCase,
    Gate,
    whole_form,
)

from lungkit.ops.attention_gate import reference

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16


def _level(
    device: str,
    threads: int,
    widths: tuple[int, int],
    edge: int,
    *,
    dims: int = 3,
    batch: int = 1,
    dtype: torch.dtype = _F32,
) -> AttentionGateCase:
    return AttentionGateCase(device, threads, *widths, (edge,) * dims, batch, dtype)


def gates(selection: str, device: str, threads: tuple[int, ...]) -> list[AttentionGateCase]:
    """ "smoke" runs in seconds, "default" in minutes, "full" in hours."""
    many = threads[0]
    if selection == "smoke":
        return [_level(device, many, (8, 4), 9, dtype=_BF16)]
    levels = [((32, 16), 96), ((64, 32), 48), ((128, 64), 24), ((256, 128), 12)]
    if selection == "full":
        found = [
            _level(device, count, *level, dtype=dtype)
            for count, level, dtype in product(
                threads, [*levels, ((32, 16), 128), ((16, 8), 128)], (_F32, _BF16, _F16)
            )
        ]
        found += [
            _level(device, count, (64, 32), 512, dims=2, batch=8, dtype=dtype)
            for count, dtype in product(threads, (_F32, _BF16, _F16))
        ]
        return found
    if device == "cuda":
        return [
            _level(device, many, (32, 16), 128, dtype=_BF16),
            _level(device, many, (64, 32), 64, batch=4, dtype=_BF16),
            _level(device, many, (32, 16), 96),
            _level(device, many, (128, 64), 24, dtype=_BF16),
            _level(device, many, (256, 128), 12, dtype=_BF16),
            _level(device, many, (64, 32), 512, dims=2, batch=8, dtype=_BF16),
        ]
    return [
        *(_level(device, count, *levels[0]) for count in threads),
        *(_level(device, many, *level) for level in levels[1:]),
        _level(device, many, (64, 32), 512, dims=2, batch=8),
    ]


@pytest.mark.cases(of=gates)
def test_attention_gate(
    report: Callable[..., None], case: AttentionGateCase, mode: str, provider: str
) -> None:
    report(case, mode, provider)


@pytest.mark.parametrize("form", [GATES["lungkit"](), whole_form], ids=["lungkit", "the form to compile"])
def test_providers_solve_the_same_problem(form: Gate) -> None:
    case = _level("cpu", 1, (8, 4), 7)
    inputs = [tensor for name, tensor in case.inputs().items() if name != "grad_out"]
    for found, expected in zip(form(*inputs), reference(*inputs), strict=True):
        torch.testing.assert_close(found, expected)
