"""Lesions that are numbered beside their class, in labels that take the same road as those without numbers."""

from __future__ import annotations

from typing import Literal

import cc3d
import numpy as np
import torch
from torch import Tensor

from lungkit.data.dataset import IGNORE_INDEX
from lungkit.losses.lesions import MOST_LESIONS


def number_lesions(labels: Tensor) -> Tensor:
    r"""Class indices and, 256 times larger, the number of the lesion that a voxel belongs to.

    A lesion is a component of one class, connected over faces, edges or corners. Each image is numbered by itself;
    where it has more than 255 lesions, the others share the last number. In augmentation a lesion so keeps its number,
    whatever becomes of its shape.

    Args:
        labels: uint8 (B, Y, X) or (B, Z, Y, X), on the CPU; 0 and 255 are no lesions.

    Returns:
        int32 of the same shape, for :func:`split_lesion_numbers`.

    Example:
        >>> labels = torch.tensor([[[1, 0, 0, 1], [1, 0, 2, 1]]], dtype=torch.uint8)
        >>> split_lesion_numbers(number_lesions(labels))[1].tolist()
        [[[1, 0, 0, 2], [1, 0, 3, 2]]]
    """
    numbered = labels.to(torch.int32)
    connectivity: Literal[8, 26] = 8 if labels.dim() == 3 else 26
    for image, of_image in zip(labels.numpy(), numbered.numpy(), strict=True):
        lesions = np.where(image == IGNORE_INDEX, np.uint8(0), image)
        if lesions.any():
            numbers = cc3d.connected_components(lesions, connectivity=connectivity)
            of_image += 256 * np.minimum(numbers, MOST_LESIONS).astype(np.int32)
    return numbered


def split_lesion_numbers(numbered: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (uint8) and numbers of lesions (int32) of what :func:`number_lesions` made."""
    return (numbered & 255).to(torch.uint8), numbered >> 8
