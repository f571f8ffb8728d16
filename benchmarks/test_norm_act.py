"""Instance norm, leaky ReLU and residual at the levels of a network, in both memory layouts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from norm_act_providers import FORMS, NormActCase

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16


def norms(selection: str, device: str, threads: tuple[int, ...]) -> list[NormActCase]:
    """ "smoke" runs in seconds, "default" in minutes, "full" in hours."""
    if selection == "smoke":
        return [NormActCase(device, threads[0], (1, 4, 9, 9), _BF16, True, True)]
    shapes = [(1, 16, 64, 64, 64), (1, 128, 8, 8, 8), (8, 32, 96, 96)]
    if device == "cuda":
        shapes = [(2, 32, 128, 128, 128), (2, 64, 64, 64, 64), (2, 320, 8, 8, 8), (8, 64, 256, 256)]
    if selection == "full":
        return [
            NormActCase(device, count, shape, dtype, last, residual)
            for count, shape, dtype, last, residual in product(
                threads, shapes, (_F32, _BF16, _F16), (False, True), (False, True)
            )
        ]
    return [
        NormActCase(device, threads[0], shape, dtype, last)
        for shape, dtype, last in product(shapes, (_F32, _BF16), (False, True))
    ]


@pytest.mark.cases(of=norms)
def test_norm_act(report: Callable[..., None], case: NormActCase, mode: str, provider: str) -> None:
    report(case, mode, provider)


@pytest.mark.parametrize("with_residual", [False, True])
def test_providers_solve_the_same_problem(with_residual: bool) -> None:
    case = NormActCase("cpu", 1, (2, 4, 5, 6), with_residual=with_residual)
    inputs = case.inputs()
    expected = case.build("group norm, eager", inputs).forward()
    for name in (name for name in FORMS if "compiled" not in name):
        torch.testing.assert_close(case.build(name, inputs).forward(), expected)
