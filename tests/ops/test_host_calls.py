"""What the cost model declares that an op asks of the host is what its launch code asks for on the emulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_paths import Configuration, Gate, HostCalls, gate_backward, gate_forward
from kernel_paths.confusion_counts import Counts, counts_forward
from kernel_paths.dice_ce import Loss, loss_backward, loss_forward
from kernel_paths.gate_tail import Tail, psi_backward, psi_forward, scale_backward, scale_forward
from kernel_paths.norm_act import Norm, norm_backward, norm_forward
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

SMALL, LARGE = (2, 8, 16), (16, 16, 16)
GATE = Gate(1, 32, 16, SMALL)
TAIL = Tail(1, 16, SMALL)
NORMS = [Norm(1, 8, grid, by_voxel=True) for grid in (SMALL, LARGE)]  # one launch, three
OF_SOFTMAX = ("softmax", "softmax", False, 0.0, None, False)


def _features(channels: int, grid: tuple[int, ...] = SMALL) -> Tensor:
    return torch.randn(1, channels, *grid, dtype=torch.bfloat16)


def _labels() -> Tensor:
    return torch.randint(2, (1, *SMALL), dtype=torch.uint8)


def _of_gate() -> tuple[Tensor, ...]:
    coarse = tuple(size // 2 for size in SMALL)
    return _features(32), _features(16, coarse), torch.randn(16, 32), torch.randn(16), torch.randn(1)


def _loss(ops: Any) -> object:
    of_loss = (True, False, False, True, 1e-5, 1e-5, 1.0, 1.0, 0.0)
    return ops.dice_ce_loss(_features(2), _labels(), None, None, *OF_SOFTMAX, *of_loss)


def _loss_gradient(ops: Any) -> object:
    return ops.dice_ce_backward(torch.randn(6, 1, 2), None, _features(2), _labels(), None, *OF_SOFTMAX)


def _norm(norm: Norm) -> Callable[[Any], object]:
    def call(ops: Any) -> object:
        x = _features(8, norm.grid).contiguous(memory_format=torch.channels_last_3d)
        return ops.norm_act(x, torch.ones(8), torch.zeros(8), None, 8, 1e-5, 0.01)

    return call


def _norm_gradient(norm: Norm) -> Callable[[Any], object]:
    def call(ops: Any) -> object:
        x = _features(8, norm.grid).contiguous(memory_format=torch.channels_last_3d)
        saved = (torch.zeros(1, 8), torch.ones(1, 8), torch.ones(8), torch.zeros(8))
        return ops.norm_act_backward(x, x, None, *saved, 0.01, False)

    return call


CALLS: list[tuple[Configuration, Callable[[Any], object]]] = [
    (gate_forward(GATE), lambda ops: ops.attention_gate(*_of_gate())),
    (
        gate_backward(GATE),
        lambda ops: ops.attention_gate_backward(_features(32), None, *_of_gate(), *(True,) * 4),
    ),
    (loss_forward(Loss(1, 2, SMALL)), _loss),
    (loss_backward(Loss(1, 2, SMALL)), _loss_gradient),
    (psi_forward(TAIL), lambda ops: ops.gate_psi(_features(16), _features(16), torch.randn(16))),
    (
        psi_backward(TAIL),
        lambda ops: ops.gate_psi_backward(_features(1), _features(16), torch.randn(16), True, True),
    ),
    (scale_forward(TAIL), lambda ops: ops.gate_scale(_features(16), _features(1))),
    (
        scale_backward(TAIL),
        lambda ops: ops.gate_scale_backward(_features(16), _features(16), _features(1), True, True),
    ),
    (counts_forward(Counts(1, 2, SMALL)), lambda ops: ops.confusion_counts(_labels(), _labels(), 2, None)),
    *((norm_forward(norm), _norm(norm)) for norm in NORMS),
    *((norm_backward(norm), _norm_gradient(norm)) for norm in NORMS),
]


@pytest.mark.parametrize(
    ("configuration", "call"), CALLS, ids=[configuration.name for configuration, _ in CALLS]
)
def test_emulated_calls_ask_the_host_for_what_is_declared(emulator, configuration, call):
    call(torch.ops.lungkit_emulated)  # what is done once
    with emulator.counted() as counts, profile(activities=[ProfilerActivity.CPU]) as profiled:
        call(torch.ops.lungkit_emulated)
    asked = Counter(event.name for event in profiled.events() if _within_an_op(event))
    found = HostCalls(
        allocations=asked["aten::empty"] + asked["aten::empty_strided"],
        fills=asked["aten::zero_"] + asked["aten::fill_"],
        copies=asked["aten::copy_"],
        checks=asked["aten::to"] + asked["aten::contiguous"],
    )
    assert (counts.launches, counts.attributes) == (len(configuration.launches), 0)
    assert found == configuration.host


def _within_an_op(event: FunctionEvent) -> bool:
    """Not among what makes its arguments."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if event.name.startswith("lungkit_emulated::"):
            return True
    return False
