"""From a preprocessed image to a label map, and to the attention map of one slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lungkit.errors import UsageError
from lungkit.inference.classes import classes_from_logits
from lungkit.inference.rows import ContextRows, Rows, TensorRows, with_context
from lungkit.inference.sliding_window import Network, Progress, device_of, first_output, stream_logits


class PreparedImage(Protocol):
    """What :func:`predict_case` needs of a case; :class:`lungkit.data.CachedCase` has it."""

    def image_float(self) -> np.ndarray:
        """The normalised image, float32 (C, Z, Y, X)."""


def predict_label(
    network: Network,
    image: Tensor,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    whole_slices: bool = False,
    context_slices: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    r"""Class of every voxel of a volume, from a 2D or 3D network by sliding window.

    A voxel gets the class of its largest logit (the lowest class of a tie); a network with one output channel is a
    sigmoid model, class 1 where the logit is positive. Logits are kept for one slab at a time.

    Args:
        network: takes (B, C, \*patch), see :func:`~lungkit.inference.sliding_window`.
        image: (C, Z, Y, X) float tensor.
        patch_size: (Z, Y, X) for a 3D network; (Y, X) for a 2D one, which sees one axial slice at a time. A slice that
            is no larger than the patch takes one call, ``batch_size`` slices together.
        overlap: share of a patch in common with its neighbour, along the axes of ``patch_size``.
        batch_size: patches in one call of the network.
        whole_slices: let a 2D network take every slice whole, whatever its size; ``patch_size`` then only says 2D.
        context_slices: slices on either side that a 2D network takes as channels, see :func:`with_context`.
        progress: called with the patches done and the patches in all.

    Returns:
        uint8 (Z, Y, X) on the image's device.

    Raises:
        UsageError: an argument is out of its range, or the network has more than 256 classes.

    Example:
        >>> image = torch.tensor([[[[0.0, 2.0, -1.0], [3.0, 0.5, -2.0]]]])
        >>> predict_label(lambda x: torch.cat([-x, x], 1), image, (2, 2)).tolist()
        [[[0, 1, 0], [1, 1, 0]]]
    """
    if image.dim() != 4:
        raise UsageError(f"image must be (C, Z, Y, X), got shape {tuple(image.shape)}")
    if whole_slices and len(patch_size) != 2:
        raise UsageError(f"whole_slices is for 2D networks, but patch_size is {tuple(patch_size)}")
    label = torch.zeros(image.shape[1:], dtype=torch.uint8, device=image.device)
    for first, last, logits in stream_case(
        network, image, patch_size, overlap, batch_size, whole_slices, context_slices, progress
    ):
        label[first:last] = classes_from_logits(logits)
    return label


def predict_case(
    network: Network,
    case: PreparedImage,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    whole_slices: bool = False,
    context_slices: int = 0,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """:func:`predict_label` of a cached case: its label map as uint8 (Z, Y, X), on the grid of the cache.

    The image is moved to ``device``, by default to where the network's parameters are.
    """
    image = torch.from_numpy(np.ascontiguousarray(case.image_float(), dtype=np.float32))
    label = predict_label(
        network,
        image.to(device or device_of(network, image.device)),
        patch_size,
        overlap=overlap,
        batch_size=batch_size,
        whole_slices=whole_slices,
        context_slices=context_slices,
        progress=progress,
    )
    return label.cpu().numpy()


def attention_map(
    network: Callable[..., tuple[Tensor, Sequence[Tensor]]],
    image: Tensor,
    patch_size: Sequence[int],
    slice_index: int,
    *,
    level: int = 0,
    overlap: float = 0.5,
    batch_size: int = 4,
    whole_slices: bool = False,
    context_slices: int = 0,
) -> Tensor:
    """The coefficients alpha of one attention gate over one axial slice, stitched as the logits are.

    A gate below full resolution is interpolated linearly up to it. For a 3D network the patches are laid over the
    slab, one patch deep, round the slice.

    Args:
        network: ``network(patches, return_attention=True)`` gives logits and one map (B, 1, ...) a gate, as
            :class:`lungkit.nn.AttentionUNet` does.
        image: (C, Z, Y, X) float tensor.
        patch_size: as for :func:`predict_label`.
        slice_index: z of the slice.
        level: which gate, counted from the finest.
        overlap: as for :func:`predict_label`.
        batch_size: as for :func:`predict_label`.
        whole_slices: as for :func:`predict_label`.
        context_slices: as for :func:`predict_label`.

    Returns:
        float32 (Y, X), values between 0 and 1.

    Raises:
        UsageError: no such slice or gate.

    Example:
        >>> def network(x, return_attention=False):
        ...     return x, (torch.sigmoid(x), torch.sigmoid(x[..., ::2, ::2]))
        >>> attention_map(network, torch.zeros(1, 3, 4, 4), (4, 4), 1)[0].tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    depth = image.shape[1]
    if not 0 <= slice_index < depth:
        raise UsageError(f"slice_index must be between 0 and {depth - 1}, got {slice_index}")
    thick = 1 if len(patch_size) == 2 else min(patch_size[0], depth)
    first = min(max(slice_index - thick // 2, 0), depth - thick)
    slab = with_context(image, context_slices)[:, first : first + thick]

    def alpha(patches: Tensor) -> Tensor:
        _, maps = network(patches, return_attention=True)
        by_size = sorted(maps, key=lambda gate: gate[0].numel(), reverse=True)
        if not 0 <= level < len(by_size):
            raise UsageError(
                f"level must be between 0 and {len(by_size) - 1} (gates, finest first), got {level}"
            )
        mode = "bilinear" if patches.dim() == 4 else "trilinear"
        return F.interpolate(by_size[level].float(), size=patches.shape[2:], mode=mode, align_corners=False)

    slabs = stream_case(alpha, slab, patch_size, overlap, batch_size, whole_slices, 0, None, module=network)
    maps = [logits[0].clone() for _, _, logits in slabs]
    return torch.cat(maps)[slice_index - first]


def stream_case(
    network: Network,
    image: Tensor | Rows,
    patch_size: Sequence[int],
    overlap: float,
    batch_size: int,
    whole_slices: bool,
    context_slices: int,
    progress: Progress | None,
    module: object | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    if len(patch_size) == 3:
        if context_slices:
            raise UsageError(f"context_slices is for 2D networks, but patch_size is {tuple(patch_size)}")
        return stream_logits(
            network,
            image,
            patch_size,
            overlap=overlap,
            batch_size=batch_size,
            progress=progress,
            module=module,
        )
    if len(patch_size) != 2:
        raise UsageError(f"patch_size must be (Y, X) or (Z, Y, X), got {tuple(patch_size)}")

    if context_slices < 0:
        raise UsageError(f"context_slices must be 0 or more, got {context_slices}")
    rows = TensorRows(image) if isinstance(image, Tensor) else image
    if context_slices:
        rows = ContextRows(rows, context_slices)

    # To the sliding window a 2D network is a 3D one whose patches are one slice deep.
    def slicewise(patches: Tensor) -> Tensor:
        return first_output(network(patches.squeeze(2))).unsqueeze(2)

    patch = (1, *(rows.shape[2:] if whole_slices else patch_size))
    return stream_logits(
        slicewise,
        rows,
        patch,
        overlap=overlap,
        batch_size=batch_size,
        progress=progress,
        module=network if module is None else module,
    )
