"""Counts of a validation: true positives, false positives and false negatives of masks and of logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from confusion_counts_providers import FORMS, ConfusionCase

_F32, _BF16, _U8, _I64 = torch.float32, torch.bfloat16, torch.uint8, torch.int64


def counts(selection: str, device: str, threads: tuple[int, ...]) -> list[ConfusionCase]:
    """ "smoke" runs in seconds, "default" in minutes, "full" in hours."""
    many = threads[0]
    if selection == "smoke":
        return [ConfusionCase(device, many, (2, 9, 10, 12), 2)]
    shapes = [(2, 192, 192, 192)] if device == "cuda" else [(1, 96, 96, 96)]
    if selection == "full":
        shapes += [(8, 512, 512), (1, 97, 101, 103)]
        return [
            ConfusionCase(device, count, shape, classes, pred, labels)
            for count, shape, classes, pred, labels in product(
                threads, shapes, (2, 4, 16, 120), (_U8, _I64, _F32, _BF16), (_U8, _I64)
            )
        ]
    return [
        ConfusionCase(device, many, shape, classes, pred)
        for shape, (classes, pred) in product(
            shapes, [(2, _U8), (4, _U8), (120, _U8), (2, _F32), (2, _BF16), (16, _BF16)]
        )
    ]


@pytest.mark.cases(of=counts)
def test_confusion_counts(report: Callable[..., None], case: ConfusionCase, mode: str, provider: str) -> None:
    report(case, mode, provider)


@pytest.mark.parametrize("dtype", [_U8, _F32])
@pytest.mark.parametrize("classes", [2, 5])
def test_providers_solve_the_same_problem(classes: int, dtype: torch.dtype) -> None:
    pytest.importorskip("monai", reason="MONAI is not installed (extra 'test')")
    case = ConfusionCase("cpu", 1, (2, 9, 10, 12), classes, dtype)
    inputs = case.inputs()
    expected = case.build("histogram, eager", inputs).forward()
    for name in (name for name in FORMS if "compiled" not in name):
        assert torch.equal(case.build(name, inputs).forward(), expected)
