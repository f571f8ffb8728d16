"""What the face and the twin of Dice + cross-entropy share about their tensors: kinds of labels, dtypes, layouts."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the sums over logits of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_class_indices(logits: Tensor, labels: Tensor) -> bool:
    r"""Whether labels are class indices (B, \*S) or (B, 1, \*S) rather than one vector (B, C, \*S) a voxel.

    Beside one channel, integers are indices (0 or 1) and floating numbers are soft labels.
    """
    one_channel = labels.dim() < logits.dim() or labels.shape[1] == 1
    return one_channel and not (logits.shape[1] == 1 and labels.is_floating_point())


def empty_gradient(logits: Tensor) -> Tensor:
    """Memory for the gradient of the logits: laid out as they are where that is channels-last, else contiguously."""
    channels = logits.shape[1]
    channels_last = (
        channels > 1
        and not logits.is_contiguous()
        and logits.movedim(1, -1).is_contiguous()
        and logits.stride(1) == 1
    )
    if channels_last:
        return torch.empty_like(logits)
    return logits.new_empty(logits.shape)
