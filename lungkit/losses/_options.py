"""What the losses of the family share: checks of their options and of the labels they take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lungkit.errors import UsageError


def activation_name(*, sigmoid: bool, softmax: bool) -> str:
    """The op's name of the activation that MONAI's two switches choose."""
    if sigmoid and softmax:
        raise UsageError("sigmoid and softmax exclude each other; got both True")
    return "sigmoid" if sigmoid else "softmax" if softmax else "none"


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise where ``value`` is none of ``choices``."""
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_not_negative(**values: float) -> None:
    """Raise where one of ``values`` is below 0."""
    for name, value in values.items():
        if value < 0:
            raise UsageError(f"{name} must not be negative, got {value}")


def weight_tensor(weight: Tensor | Sequence[float] | float | None) -> Tensor | None:
    """Class weights as a tensor that requires no gradient; none may be negative."""
    if weight is None:
        return None
    tensor = torch.as_tensor(weight).detach()
    if tensor.dim() > 1 or (tensor.numel() > 0 and bool((tensor < 0).any())):
        raise UsageError(f"weight must be numbers that are not negative, one a class, got {tensor.tolist()}")
    return tensor


def check_labels(logits: Tensor, labels: Tensor, *, to_onehot_y: bool) -> None:
    """Raise where label vectors come although class indices were announced."""
    vectors = labels.dim() == logits.dim() and labels.shape[1] != 1
    if to_onehot_y and vectors and logits.shape[1] != 1:
        raise UsageError(
            f"to_onehot_y=True takes class indices (B, 1, *S) or (B, *S), got labels of shape {tuple(labels.shape)}; "
            "pass to_onehot_y=False for one-hot or soft labels"
        )


def check_one_channel(logits: Tensor, activation: str) -> None:
    """Raise where a single channel would be read both as logits and as probabilities."""
    if logits.dim() >= 2 and logits.shape[1] == 1 and activation != "sigmoid":
        raise UsageError(
            f"logits of shape {tuple(logits.shape)} have one channel, which needs sigmoid=True: the cross-entropy "
            "reads logits and Dice reads probabilities, so without an activation one of the two would be wrong; got "
            f"activation {activation!r}"
        )
