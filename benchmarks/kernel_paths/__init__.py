"""How often the loops of the CUDA kernels turn in the headline configurations, and the bytes that these move.

Beside each kernel: its loops by a piece of their source line, the blocks that the configuration does not reach, what a
warp has on its way while it computes, its tensor products, and the bytes that it loads, stores, copies and moves. These
are functions of the size, so that the emulator can count them at sizes that it can run, and does
(tests/ops/test_kernel_counts.py): the model of benchmarks/static_model.py cannot leave work out.
"""

from __future__ import annotations

from .attention_gate import GATES, Gate, gate_backward, gate_configurations, gate_forward
from .attention_gate_tiles import tile_configurations
from .confusion_counts import counts_configurations
from .declarations import MULTIPROCESSORS, Configuration, HostCalls, Launch
from .dice_ce import loss_configurations
from .gate_tail import tail_configurations
from .norm_act import norm_configurations

__all__ = [
    "GATES",
    "MULTIPROCESSORS",
    "Configuration",
    "Gate",
    "HostCalls",
    "Launch",
    "configurations",
    "gate_backward",
    "gate_forward",
]


def configurations() -> list[Configuration]:
    return [
        *gate_configurations(),
        *tile_configurations(),
        *loss_configurations(),
        *tail_configurations(),
        *counts_configurations(),
        *norm_configurations(),
    ]
