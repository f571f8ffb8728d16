"""What the cost model declares of the kernels is what the emulator counts while they run."""

from __future__ import annotations

import pytest
import torch
from kernel_paths import Gate, gate_backward, gate_forward

GATES = [
    Gate(1, 32, 16, (4, 6, 64)),
    Gate(2, 64, 32, (6, 96)),
    Gate(1, 32, 16, (4, 6, 64), by_voxel=True),
    Gate(2, 64, 32, (6, 96), by_voxel=True),
]


def _tensors(gate: Gate) -> tuple[torch.Tensor, ...]:
    coarse = tuple(size // 2 for size in gate.fine)
    order = torch.channels_last if len(gate.fine) == 2 else torch.channels_last_3d
    features = [
        torch.randn(gate.images, channels, *grid, dtype=torch.bfloat16)
        for channels, grid in ((gate.channels, gate.fine), (gate.inner, coarse))
    ]
    if gate.by_voxel:
        features = [tensor.contiguous(memory_format=order) for tensor in features]
    return (*features, torch.randn(gate.inner, gate.channels), torch.randn(gate.inner), torch.randn(1))


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.label)
def test_emulated_forward_makes_the_declared_products_and_copies(emulator, gate):
    with emulator.counted() as counts:
        torch.ops.lungkit_emulated.attention_gate(*_tensors(gate))
    (launch,) = gate_forward(gate).launches
    assert (counts.products, counts.copied_bytes) == (launch.products, launch.copied_bytes)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.label)
def test_emulated_backward_makes_the_declared_products_copies_and_launches(emulator, gate):
    inputs = _tensors(gate)
    with emulator.counted() as counts:
        torch.ops.lungkit_emulated.attention_gate_backward(inputs[0], None, *inputs, True, True, True, True)
    launches = gate_backward(gate).launches
    assert counts.launches == len(launches)
    assert counts.products == sum(launch.products for launch in launches)
    assert counts.copied_bytes == sum(launch.copied_bytes for launch in launches)
