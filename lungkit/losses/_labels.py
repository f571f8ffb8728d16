"""What the losses accept as labels beyond what the op reads."""

from __future__ import annotations

import torch
from torch import Tensor

from lungkit.errors import UsageError


def labels_for(logits: Tensor, labels: Tensor, *, to_onehot_y: bool) -> Tensor:
    """Labels as the op reads them: class indices stored as floating numbers become integers (a copy)."""
    vectors = labels.dim() == logits.dim() and labels.shape[1] != 1
    if to_onehot_y and vectors and logits.shape[1] != 1:
        raise UsageError(
            f"to_onehot_y=True takes class indices (B, 1, *S) or (B, *S), got labels of shape {tuple(labels.shape)}; "
            "pass to_onehot_y=False for one-hot or soft labels"
        )
    if labels.is_floating_point() and not vectors and logits.dim() >= 2 and logits.shape[1] != 1:
        return labels.to(torch.int32)
    return labels
