"""From a preprocessed image to a label map, and to the attention map of one slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lungkit.data.slices import ContextSlices, Slices, TensorSlices
from lungkit.errors import UsageError
from lungkit.inference.sliding_window import Network, Progress, device_of, predict_label, stream_logits


def predict_case(
    network: Network,
    case: Any,
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
        image.shape[-2:] if whole_slices else patch_size,
        overlap=overlap,
        batch_size=batch_size,
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
    slab = ContextSlices(TensorSlices(image), context_slices).read(first, first + thick)

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
    image: Tensor | Slices,
    patch_size: Sequence[int],
    overlap: float,
    batch_size: int,
    whole_slices: bool,
    context_slices: int,
    progress: Progress | None,
    module: object | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    return stream_logits(
        network,
        image,
        tuple(image.shape[-2:]) if whole_slices else patch_size,
        overlap=overlap,
        batch_size=batch_size,
        context_slices=context_slices,
        progress=progress,
        module=module,
    )
