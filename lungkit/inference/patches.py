"""Where patches lie in a scan, how much each counts at its voxels, how large and how many at a time they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lungkit.errors import UsageError

Weighting = Literal["gaussian", "voxel-gaussian", "constant"]
"""How much a patch counts at each of its voxels; a "voxel-gaussian" is centred on voxel n // 2 of n."""

WEIGHTINGS: tuple[Weighting, ...] = ("gaussian", "voxel-gaussian", "constant")


@dataclass(frozen=True)
class Tiling:
    """How patches are laid over a scan for a network: each model is used with the tiling it was measured with.

    Args:
        whole_slices: a 2D network takes slices whole, else in patches of the size that it was trained on.
        weighting: of the voxels of a patch.
        whole_steps: the step between patches is rounded down to whole voxels before patches are counted; that makes a
            difference where patch x (1 - overlap) is no whole number.
        padding: what an image smaller than a patch is padded with, each channel's "minimum" or "zero".
    """

    whole_slices: bool = True
    weighting: Weighting = "gaussian"
    whole_steps: bool = True
    padding: Literal["minimum", "zero"] = "minimum"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS or self.padding not in ("minimum", "zero"):
            raise UsageError(
                f"weighting must be one of {', '.join(map(repr, WEIGHTINGS))}, got {self.weighting!r}; padding "
                f"'minimum' or 'zero', got {self.padding!r}"
            )


TILING = Tiling()
"""Of models that say nothing, as lungkit's did until they were used in patches."""

TRAINED_TILING = Tiling(whole_slices=False)
"""Of the models that lungkit trains. A patch of another size than those of training has other statistics at its norms,
and its zero padding elsewhere: on nodules the Dice of whole slices was lower, from pieces that are not there."""

_SIGMA_FRACTION = 1 / 8
_SMALLEST = 32

# Measured on a CPU with 1 MiB of L2 a core: small patches take a third less time a voxel some at a time, but bf16 takes
# more again where the features of a call leave the cache, as those of one slice of 512 x 512 do not. A GPU wants to be
# filled.
_VOXELS_PER_CALL = {"cpu": 1 << 18, "cuda": 1 << 22}


class PatchAxis:
    """Where patches lie along one axis, and how much each counts at each of its voxels.

    Attributes:
        starts: first voxel of every patch.
        weights: for every patch its Gaussian (or 1), divided by the sum of those of all patches at the voxel: the
            weights of the patches that hold a voxel add up to 1. Their products over the axes do so too, so that no
            volume of summed weights is needed, and a voxel that one patch alone holds takes its logits unchanged.
            float32 (number of patches, patch).
    """

    def __init__(
        self,
        extent: int,
        patch: int,
        overlap: float,
        weighting: Weighting,
        device: torch.device,
        *,
        whole_steps: bool = True,
    ) -> None:
        self.starts = patch_starts(extent, patch, overlap=overlap, whole_steps=whole_steps)
        centre = patch // 2 if weighting == "voxel-gaussian" else None
        own = (
            torch.ones(patch) if weighting == "constant" else gaussian_weights(patch, centre=centre)
        ).double()
        total = torch.zeros(extent, dtype=torch.float64)
        for start in self.starts:
            total[start : start + patch] += own
        weights = torch.stack([own / total[start : start + patch] for start in self.starts])
        self.weights = weights.float().to(device)


def patch_starts(extent: int, patch: int, *, overlap: float = 0.5, whole_steps: bool = True) -> list[int]:
    """First voxels of the fewest patches that cover an axis evenly and overlap by at least ``overlap``.

    Without ``whole_steps`` their mean overlap is at least that, and rounding may take half a voxel of one.

    Example:
        >>> patch_starts(100, 40, overlap=0.5)
        [0, 20, 40, 60]
        >>> patch_starts(90, 40, overlap=0.5)
        [0, 17, 33, 50]
    """
    free = extent - patch
    if free <= 0:
        return [0]
    step = patch * (1 - overlap)
    count = math.ceil(free / (max(1, math.floor(step)) if whole_steps else step))
    return [round(i * free / count) for i in range(count + 1)]


def gaussian_weights(patch: int, *, centre: float | None = None) -> Tensor:
    """Gaussian along an axis of ``patch`` voxels, 1 at its ``centre``, sigma = patch / 8; float32 (patch,).

    The centre is (patch - 1) / 2, between two voxels where their number is even, if nothing else is said.

    Example:
        >>> [round(float(w), 4) for w in gaussian_weights(5)]
        [0.006, 0.278, 1.0, 0.278, 0.006]
    """
    offset = torch.arange(patch, dtype=torch.float64) - ((patch - 1) / 2 if centre is None else centre)
    return torch.exp(-0.5 * (offset / (patch * _SIGMA_FRACTION)) ** 2).float()


def prediction_patch(
    patch_size: Sequence[int], shape: Sequence[int], *, whole_slices: bool = True
) -> tuple[int, ...]:
    """Patches of a scan of ``shape`` (Z, Y, X) for a network trained on ``patch_size``.

    (Z, Y, X) of training for a 3D network; a 2D one takes ``whole_slices``, or patches of training too.

    Example:
        >>> prediction_patch((96, 96), (100, 512, 400)), prediction_patch((64, 128, 128), (100, 512, 400))
        ((512, 400), (64, 128, 128))
    """
    return tuple(shape[1:]) if len(patch_size) == 2 and whole_slices else tuple(patch_size)


def smaller_patch(patch_size: Sequence[int], halvings: int) -> tuple[int, ...]:
    """The patch with its longest axis halved ``halvings`` times, down to 32 voxels.

    Example:
        >>> smaller_patch((64, 128, 128), 1), smaller_patch((64, 128, 128), 2), smaller_patch((512, 400), 1)
        ((64, 64, 64), (32, 32, 32), (256, 400))
    """
    for _ in range(halvings):
        longest = max(patch_size)
        if longest < 2 * _SMALLEST:
            break
        patch_size = [entry // 2 if entry == longest else entry for entry in patch_size]
    return tuple(patch_size)


def patches_per_call(device_type: str, patch_size: Sequence[int]) -> int:
    """How many patches a device takes at once, at least one.

    Example:
        >>> [patches_per_call(device, size) for device in ("cpu", "cuda") for size in ((128, 128), (512, 512))]
        [16, 1, 256, 16]
    """
    most = _VOXELS_PER_CALL.get(device_type, _VOXELS_PER_CALL["cpu"])
    return max(1, most // max(1, math.prod(patch_size)))


def count_patches(
    shape: Sequence[int], patch_size: Sequence[int], overlap: float, *, whole_steps: bool = True
) -> int:
    """Number of patches over a scan of ``shape`` (Z, Y, X).

    Example:
        >>> count_patches((10, 512, 512), (512, 512), 0.5), count_patches((100, 64, 64), (40, 64, 64), 0.5)
        (10, 4)
    """
    patch = (1, *patch_size)[-3:]
    return math.prod(
        len(patch_starts(n, p, overlap=overlap, whole_steps=whole_steps))
        for n, p in zip(shape, patch, strict=True)
    )
