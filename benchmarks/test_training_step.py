"""One training step of whole networks: ours, MONAI's and nnU-Net's of equal widths, and the convolutions alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from training_step_providers import CONVOLUTIONS, FAMILIES, TrainingStepCase

_WIDTHS = (16, 32, 64, 128, 256)
# Channels, batch, size.
_SIZES = [
    (3, 8, (96, 96)),
    (1, 8, (256, 256)),
    (1, 1, (64, 64, 64)),
    (1, 2, (32, 96, 96)),
]
_ON_CUDA = [(1, 2, (128, 128, 128))]


def steps(selection: str, device: str, threads: tuple[int, ...]) -> list[TrainingStepCase]:
    """ "smoke" runs in seconds, "default" in minutes; "full" adds bf16 on the CPU and compiled networks."""
    if selection == "smoke":
        return [
            TrainingStepCase(device, threads[0], family, (32, 32), (4, 4, 4, 4, 4), batch=1)
            for family in FAMILIES
        ]
    full, on_gpu = selection == "full", device == "cuda"
    sizes = _SIZES + (_ON_CUDA if on_gpu else []) if full or on_gpu else [_SIZES[0], _SIZES[2]]
    types = (False, True) if full or on_gpu else (False,)
    return [
        TrainingStepCase(device, threads[0], family, size, _WIDTHS, channels, batch, autocast, compiled=full)
        for (channels, batch, size), autocast, family in product(sizes, types, FAMILIES)
    ]


@pytest.mark.cases(of=steps)
def test_training_step(report: Callable[..., None], case: TrainingStepCase, mode: str, provider: str) -> None:
    report(case, mode, provider)


def test_the_bound_runs_every_convolution_of_the_network() -> None:
    case = TrainingStepCase("cpu", 1, "U-Net", (32, 32), (4, 4, 4, 4, 4))
    outputs = case.build(CONVOLUTIONS, case.inputs()).forward()
    network = FAMILIES["U-Net"]["lungkit"](case)
    assert len(outputs) == sum(isinstance(m, torch.nn.modules.conv._ConvNd) for m in network.modules())
    assert outputs[-1].shape == (1, 2, 32, 32)
