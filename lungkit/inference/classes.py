"""From logits or probabilities to the class of every voxel."""

from __future__ import annotations

import torch
from torch import Tensor

from lungkit.errors import UsageError


def largest(scores: Tensor) -> Tensor:
    r"""Index of the largest of (K, \*S), the lowest of a tie, as uint8 (\*S).

    torch.argmax gives the same, but on a CPU takes up to a hundred times as long along an outer axis.

    Example:
        >>> largest(torch.tensor([[0.5, 0.1, 0.2], [0.5, 0.2, 0.1], [0.0, 0.7, 0.2]])).tolist()
        [0, 2, 0]
    """
    if len(scores) == 1:
        return torch.zeros(scores.shape[1:], dtype=torch.uint8, device=scores.device)
    classes = (scores[1] > scores[0]).view(torch.uint8)
    if len(scores) == 2:
        return classes
    highest = torch.maximum(scores[0], scores[1])
    for index in range(2, len(scores)):
        classes = torch.where(scores[index] > highest, index, classes)
        highest = torch.maximum(highest, scores[index])
    return classes


def classes_from_logits(logits: Tensor) -> Tensor:
    r"""Class of every voxel from logits (K, \*S): the largest, above 0 for the single one of a sigmoid model.

    Returns:
        uint8 (\*S), on the device of ``logits``.

    Raises:
        UsageError: no class or more than 256 of them.

    Example:
        >>> classes_from_logits(torch.tensor([[-1.0, 2.0]])).tolist()
        [0, 1]
    """
    _check_count(len(logits))
    return (logits[0] > 0).view(torch.uint8) if len(logits) == 1 else largest(logits)


def classes_from_probabilities(probabilities: Tensor, threshold: float | None = None) -> Tensor:
    r"""Class of every voxel.

    Args:
        probabilities: (K, \*S), background first; K = 1 is the foreground of a sigmoid model.
        threshold: see :class:`Postprocessing`; None is argmax (the lowest class of a tie), above 1/2 for K = 1.

    Returns:
        uint8 (\*S), on the device of ``probabilities``.

    Raises:
        UsageError: no class or more than 256 of them.

    Example:
        >>> p = torch.tensor([[0.5, 0.1], [0.3, 0.2], [0.2, 0.7]])
        >>> classes_from_probabilities(p).tolist(), classes_from_probabilities(p, 0.5).tolist()
        ([0, 2], [1, 2])
    """
    count = len(probabilities)
    _check_count(count)
    if count == 1:
        single = probabilities[0]
        return (single > 0.5 if threshold is None else single >= threshold).to(torch.uint8)
    if threshold is None:
        return largest(probabilities)
    foreground = probabilities[1:]
    if count == 2:
        return (foreground[0] >= threshold).to(torch.uint8)
    classes = largest(foreground) + 1
    return classes * (foreground.sum(0) >= threshold)


def _check_count(classes: int) -> None:
    if not 1 <= classes <= 256:
        raise UsageError(f"there are {classes} classes, but label maps are uint8 and hold 1 to 256")
