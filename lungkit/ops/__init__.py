"""The fused ops: functions with a plain-PyTorch twin (``reference`` in each module) and, where built, kernels."""

from __future__ import annotations

from lungkit.ops.attention_gate import attention_gate
from lungkit.ops.confusion_counts import confusion_counts
from lungkit.ops.dice_ce import dice_ce_loss, dice_ce_statistics
from lungkit.ops.gate_tail import gate_psi, gate_scale

__all__ = [
    "attention_gate",
    "confusion_counts",
    "dice_ce_loss",
    "dice_ce_statistics",
    "gate_psi",
    "gate_scale",
]
