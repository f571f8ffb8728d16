"""What surrounds a call: autocast, and the modes and transforms in which only torch's own operators are known."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for ``x``, or None: where it is off, for float64, on devices that have none."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward differentiation is at work, which custom ops do not know."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def runs_plainly() -> bool:
    """Whether a call is computed as it stands: not traced, transformed, counted or faked."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
    )
