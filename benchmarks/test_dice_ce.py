"""Soft Dice + cross-entropy: lungkit, the best eager and compiled forms, MONAI, nnU-Net's formula."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from dice_ce_providers import LOSSES, LOSSES_OF_SHARES, DiceCECase, SharesCase

from lungkit.losses import DiceCELoss

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_U8, _I64 = torch.uint8, torch.int64


def cases(selection: str, device: str, threads: tuple[int, ...]) -> list[DiceCECase]:
    """ "smoke" runs in seconds, "default" in minutes, "full" in hours."""

    def case(
        count: int,
        shape: tuple[int, ...],
        logits: torch.dtype = _F32,
        labels: torch.dtype = _U8,
        channels_last: bool = False,
    ) -> DiceCECase:
        return DiceCECase(device, count, shape, logits, labels, channels_last)

    many = threads[0]
    if selection == "smoke":
        return [case(many, (2, 2, 12, 12, 12)), SharesCase(device, many, (2, 2, 12, 12, 12))]
    if selection == "full":
        shapes = [(2, 2, n, n, n) for n in (96, 128, 160, 192, 256, 320)]
        shapes += [(2, 4, 96, 96, 96), (2, 4, 192, 192, 192), (1, 16, 96, 96, 96), (1, 16, 192, 192, 192)]
        shapes += [(1, 100, 64, 64, 64), (1, 100, 128, 128, 128), (8, 2, 512, 512)]
        return [
            case(count, *rest)
            for count, *rest in product(threads, shapes, (_F32, _BF16, _F16), (_U8, torch.int32, _I64))
        ]
    if device == "cuda":
        cube = (2, 2, 192, 192, 192)
        return [
            case(many, (2, 2, 96, 96, 96), _F32, _I64),
            case(many, cube, _F32, _U8),
            case(many, cube, _BF16, _U8),
            case(many, cube, _BF16, _I64),
            case(many, cube, _F16, _U8),
            case(many, cube, _BF16, _U8, channels_last=True),
            case(many, (2, 2, 191, 193, 191), _BF16, _U8),
            case(many, (2, 2, 256, 256, 256), _BF16, _U8),
            case(many, (2, 3, 192, 192, 192), _BF16, _U8),
            case(many, (2, 4, 192, 192, 192), _BF16, _U8),
            case(many, (1, 16, 128, 128, 128), _BF16, _U8),
            case(many, (1, 100, 96, 96, 96), _BF16, _U8),
            SharesCase(device, many, cube, _BF16),
        ]
    patch = (2, 2, 96, 96, 96)
    return [
        *(case(count, patch, _F32, labels) for count, labels in product(threads, (_I64, _U8))),
        case(many, patch, _BF16, _U8),
        case(many, patch, _F16, _U8),
        case(many, (2, 2, 192, 192, 192), _F32, _U8),
        case(many, (2, 4, 96, 96, 96), _F32, _U8),
        case(many, (1, 16, 96, 96, 96), _F32, _U8),
        case(many, (1, 100, 64, 64, 64), _F32, _U8),
        case(many, (8, 2, 512, 512), _F32, _U8),
        SharesCase(device, many, patch),
        SharesCase(device, many, (32, 2, 96, 96)),
    ]


@pytest.mark.cases(of=cases)
def test_dice_ce(report: Callable[..., None], case: DiceCECase, mode: str, provider: str) -> None:
    report(case, mode, provider)


@pytest.mark.parametrize("provider", [name for name in LOSSES if "compiled" not in name])
def test_providers_solve_the_same_problem(provider: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 2, 6, 7, 8, generator=generator)
    labels = torch.randint(2, (2, 6, 7, 8), generator=generator)
    if provider == "MONAI":
        pytest.importorskip("monai", reason="MONAI is not installed (extra 'test')")
    if provider == "nnU-Net's formula":
        expected = DiceCELoss.nnunet()(logits, labels) - 1
    else:
        expected = DiceCELoss(softmax=True)(logits, labels)
    assert LOSSES[provider]()(logits, labels) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("provider", [name for name in LOSSES_OF_SHARES if name != "compiled"])
def test_providers_of_shares_solve_the_same_problem(provider: str) -> None:
    logits, shares = SharesCase("cpu", 1, (2, 3, 6, 7)).inputs()
    expected = LOSSES_OF_SHARES["eager"]()(logits.double(), shares.double())
    assert float(LOSSES_OF_SHARES[provider]()(logits, shares)) == pytest.approx(float(expected), abs=1e-5)
