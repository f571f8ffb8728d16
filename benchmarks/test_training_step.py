"""One training step of whole networks: ours, MONAI's and nnU-Net's of equal widths, and the convolutions alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from training_step_providers import CONVOLUTIONS, FAMILIES, GRAPH, TrainingStepCase

from lungkit.inference.precision import cpu_computes_bf16
from lungkit.training.captured_step import REHEARSALS

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
    """ "smoke" runs in seconds, "default" in minutes, bf16 too where a CPU computes it; "full" adds the rest."""
    if selection == "smoke":
        return [
            TrainingStepCase(device, threads[0], family, (32, 32), (4, 4, 4, 4, 4), batch=1)
            for family in FAMILIES
        ]
    full, on_gpu = selection == "full", device == "cuda"
    sizes = _SIZES + (_ON_CUDA if on_gpu else []) if full or on_gpu else [_SIZES[0], _SIZES[2]]
    types = (False, True) if full or on_gpu or cpu_computes_bf16() else (False,)
    return [
        TrainingStepCase(device, threads[0], family, size, _WIDTHS, channels, batch, autocast, compiled=full)
        for (channels, batch, size), autocast, family in product(sizes, types, FAMILIES)
    ]


@pytest.mark.cases(of=steps)
def test_training_step(report: Callable[..., None], case: TrainingStepCase, mode: str, provider: str) -> None:
    report(case, mode, provider)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_has_the_losses_of_the_steps_in_it(family: str) -> None:
    case = TrainingStepCase("cuda", 1, family, (32, 32), (4, 4, 4, 4, 4))
    eager = case.build("lungkit", case.inputs())
    losses = []
    for _ in range(REHEARSALS + 4):
        loss = eager.forward()
        losses.append(loss.item())
        eager.backward(loss)
    replay = case.build(GRAPH, case.inputs()).forward
    assert [replay().item() for _ in range(4)] == pytest.approx(losses[REHEARSALS:], rel=1e-4)


def test_only_a_gpu_has_graphs() -> None:
    on_gpu, on_cpu = (TrainingStepCase(device, 1, "U-Net", (32, 32), (4, 4)) for device in ("cuda", "cpu"))
    assert set(on_gpu.providers) - set(on_cpu.providers) == {GRAPH}


def test_the_bound_runs_every_convolution_of_the_network() -> None:
    case = TrainingStepCase("cpu", 1, "U-Net", (32, 32), (4, 4, 4, 4, 4))
    outputs = case.build(CONVOLUTIONS, case.inputs()).forward()
    network = FAMILIES["U-Net"]["lungkit"](case)
    assert len(outputs) == sum(isinstance(m, torch.nn.modules.conv._ConvNd) for m in network.modules())
    assert outputs[-1].shape == (1, 2, 32, 32)
