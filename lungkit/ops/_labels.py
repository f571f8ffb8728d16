"""Class indices of a narrow type beside an index of any size."""

from __future__ import annotations

import torch
from torch import Tensor


def equal_to(labels: Tensor, index: int) -> Tensor:
    """Where ``labels`` hold ``index``: nowhere, if their dtype cannot hold it.

    Compared with a tensor, PyTorch brings a number into the tensor's dtype, where 256 is a 0 of uint8.

    Example:
        >>> import torch
        >>> equal_to(torch.tensor([0, 1], dtype=torch.uint8), 256).tolist()
        [False, False]
    """
    if labels.dtype == torch.bool:
        labels = labels.to(torch.uint8)
    if not labels.is_floating_point():
        held = torch.iinfo(labels.dtype)
        if not held.min <= index <= held.max:
            return torch.zeros_like(labels, dtype=torch.bool)
    return labels == index
