"""Sliding-window inference: overlapping patches, Gaussian weights, memory for one slab at a time."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lungkit.errors import UsageError

Network = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
"""Maps patches (B, C, \\*patch) to logits (B, K, \\*patch), or to a tuple of which they are the first."""

Progress = Callable[[int, int], None]
"""Called with the patches done and the patches in all."""

_SIGMA_FRACTION = 1 / 8


def sliding_window(
    network: Network,
    image: Tensor,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Tensor:
    r"""Logits of a whole image, from a network that sees one patch at a time.

    Patches lie on an even grid that covers the image (:func:`window_starts`). The logits of a voxel are the mean over
    the patches that hold it, weighted by a Gaussian round each patch's centre with sigma = patch / 8 along every axis,
    so that the borders of a patch, where the network sees least context, count least (Isensee et al. 2021,
    "nnU-Net", Nature Methods 18:203). An image smaller than the patch is padded evenly on both sides with the
    smallest value of each channel (air in CT), and the logits are cropped back.

    Patches are added up in the order of the grid in float32, hence the result is the same for every ``batch_size`` up
    to what the network itself makes of its batch.

    Args:
        network: see :data:`Network`; a module is put into evaluation mode for the call. It runs where its parameters
            are, under the autocast that is in force.
        image: (C, \*S) float tensor, S of two or three axes.
        patch_size: as many entries as S.
        overlap: share of a patch that neighbouring patches have in common at least, 0 <= overlap < 1.
        batch_size: patches in one call of the network.
        progress: see :data:`Progress`.

    Returns:
        float32 (K, \*S) on the image's device.

    Raises:
        UsageError: an argument is out of its range, or the network's output does not fit its input.

    Example:
        >>> image = torch.arange(35.0).reshape(1, 5, 7)
        >>> logits = sliding_window(lambda patches: torch.cat([patches, -patches], 1), image, (4, 4))
        >>> logits.shape, bool(torch.allclose(logits[:1], image))
        (torch.Size([2, 5, 7]), True)
    """
    logits: Tensor | None = None
    for first, last, slab in stream_logits(
        network, image, patch_size, overlap=overlap, batch_size=batch_size, progress=progress
    ):
        if logits is None:
            logits = slab.new_empty((slab.shape[0], *image.shape[1:]))
        logits[:, first:last] = slab
    if logits is None:  # stream_logits refuses empty images, so that there is at least one slab
        raise UsageError(f"image of shape {tuple(image.shape)} is empty")
    return logits


def stream_logits(
    network: Network,
    image: Tensor,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    progress: Progress | None = None,
    module: object | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    r"""The logits of :func:`sliding_window` slab by slab along the first axis, as each is finished.

    Only one slab, as deep as a patch, is in memory, so that the classes of a long scan need no float volume. Where
    ``network`` is a function round a module, ``module`` says which: its mode and device are used.

    Yields:
        ``(first, last, logits)``: float32 (K, last - first, \*S[1:]), a view that the next step overwrites. The slabs
        follow one another and cover the first axis.
    """
    _check_arguments(image, patch_size, overlap, batch_size)
    extent = tuple(image.shape[1:])
    padded, before = _pad(image, patch_size)
    windows = [Windows(n, p, overlap) for n, p in zip(padded.shape[1:], patch_size, strict=True)]
    inside = (
        slice(None),
        slice(None),
        *(slice(b, b + n) for b, n in zip(before[1:], extent[1:], strict=True)),
    )

    def finished(first: int, last: int, slab: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        low, high = max(first - before[0], 0), min(last - before[0], extent[0])
        if low < high:
            yield low, high, slab[:, low + before[0] - first : high + before[0] - first][inside]

    slab: Tensor | None = None
    at = 0  # where the slab begins in the padded image
    for index, patch in _run_patches(network, module or network, padded, windows, batch_size, progress):
        starts = [axis.starts[i] for axis, i in zip(windows, index, strict=True)]
        if slab is None:
            slab = patch.new_zeros((patch.shape[0], patch_size[0], *padded.shape[2:]))
        if starts[0] > at:
            step = starts[0] - at
            yield from finished(at, at + step, slab[:, :step])
            # No patch to come reaches back over its own start: the rest moves up, and zeros follow.
            kept = slab[:, step:].clone()
            slab[:, : kept.shape[1]] = kept
            slab[:, kept.shape[1] :] = 0
            at = starts[0]
        weights = _outer([axis.weights[i] for axis, i in zip(windows, index, strict=True)]).to(slab.device)
        target = (
            slice(None),
            slice(None),
            *(slice(s, s + p) for s, p in zip(starts[1:], patch_size[1:], strict=True)),
        )
        slab[target].addcmul_(patch, weights)
    if slab is not None:
        yield from finished(at, at + slab.shape[1], slab)


class Windows:
    """Where patches lie along one axis, and how much each counts at each of its voxels.

    Attributes:
        starts: first voxel of every patch.
        weights: for every patch its Gaussian, divided by the sum of all Gaussians at the voxel: the weights of the
            patches that hold a voxel add up to 1. Their products over the axes do so too, so that no volume of summed
            weights is needed, and a voxel that one patch alone holds takes its logits unchanged.
    """

    def __init__(self, extent: int, patch: int, overlap: float) -> None:
        self.starts = window_starts(extent, patch, overlap=overlap)
        gaussian = gaussian_weights(patch).double()
        total = torch.zeros(extent, dtype=torch.float64)
        for start in self.starts:
            total[start : start + patch] += gaussian
        self.weights = [(gaussian / total[start : start + patch]).float() for start in self.starts]


def window_starts(extent: int, patch: int, *, overlap: float = 0.5) -> list[int]:
    """First voxels of the fewest patches that cover an axis evenly and overlap by at least ``overlap``.

    Example:
        >>> window_starts(100, 40, overlap=0.5)
        [0, 20, 40, 60]
        >>> window_starts(90, 40, overlap=0.5)
        [0, 17, 33, 50]
    """
    free = extent - patch
    if free <= 0:
        return [0]
    step = max(1, math.floor(patch * (1 - overlap)))
    count = math.ceil(free / step)
    return [round(i * free / count) for i in range(count + 1)]


def gaussian_weights(patch: int) -> Tensor:
    """Gaussian along an axis of ``patch`` voxels, 1 at its centre, sigma = patch / 8; float32 (patch,).

    Example:
        >>> [round(float(w), 4) for w in gaussian_weights(5)]
        [0.006, 0.278, 1.0, 0.278, 0.006]
    """
    offset = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
    return torch.exp(-0.5 * (offset / (patch * _SIGMA_FRACTION)) ** 2).float()


@contextlib.contextmanager
def evaluation_mode(network: object) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; a module's own mode is put back after it."""
    # Each module's own mode is kept, since parts of a network may have been frozen on purpose.
    training = [m for m in network.modules() if m.training] if isinstance(network, nn.Module) else []
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def device_of(network: object, default: torch.device) -> torch.device:
    """Where a module's parameters are; ``default`` for a function or a module without any."""
    if isinstance(network, nn.Module):
        for parameter in itertools.chain(network.parameters(), network.buffers()):
            return parameter.device
    return default


def _run_patches(
    network: Network,
    module: object,
    image: Tensor,
    windows: Sequence[Windows],
    batch_size: int,
    progress: Progress | None,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Every window's index on the grid and its logits, float32 on the image's device, in the order of the grid."""
    device = device_of(module, image.device)
    grid = list(itertools.product(*(range(len(axis.starts)) for axis in windows)))
    for first in range(0, len(grid), batch_size):
        indices = grid[first : first + batch_size]
        patches = torch.stack([image[_window(windows, index)] for index in indices]).to(device)
        # Entered for each batch and not round the loop: a generator must not hold the caller in no_grad.
        with evaluation_mode(module):
            logits = first_output(network(patches))
        if (
            logits.dim() != patches.dim()
            or logits.shape[2:] != patches.shape[2:]
            or len(logits) != len(indices)
        ):
            raise UsageError(
                f"the network gave logits {tuple(logits.shape)} for patches {tuple(patches.shape)}; "
                "logits must be (B, K, *patch) over the same batch and voxels"
            )
        yield from zip(indices, logits.to(image.device, torch.float32), strict=True)
        if progress is not None:
            progress(first + len(indices), len(grid))


def first_output(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The logits at full resolution: the output itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def _window(windows: Sequence[Windows], index: Sequence[int]) -> tuple[slice, ...]:
    starts = [(axis.starts[i], len(axis.weights[i])) for axis, i in zip(windows, index, strict=True)]
    return (slice(None), *(slice(start, start + length) for start, length in starts))


def _outer(axes: Sequence[Tensor]) -> Tensor:
    product = axes[0]
    for weights in axes[1:]:
        product = product.unsqueeze(-1) * weights
    return product


def _pad(image: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The image, grown evenly to at least the patch size, and the voxels added before each axis."""
    missing = [max(0, p - n) for n, p in zip(image.shape[1:], patch_size, strict=True)]
    before = [m // 2 for m in missing]
    if not any(missing):
        return image, before
    air = image.flatten(1).amin(1).reshape(-1, *(1,) * (image.dim() - 1))
    size = [n + m for n, m in zip(image.shape[1:], missing, strict=True)]
    padded = air.expand(-1, *size).clone()
    inside = (slice(None), *(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True)))
    padded[inside] = image
    return padded, before


def _check_arguments(image: Tensor, patch_size: Sequence[int], overlap: float, batch_size: int) -> None:
    if image.dim() not in (3, 4):
        raise UsageError(f"image must be (C, Y, X) or (C, Z, Y, X), got shape {tuple(image.shape)}")
    if image.numel() == 0:
        raise UsageError(f"image of shape {tuple(image.shape)} is empty")
    if not image.is_floating_point():
        raise UsageError(f"image must be floating point and normalised, got {image.dtype}")
    if len(patch_size) != image.dim() - 1 or min(patch_size) < 1:
        raise UsageError(
            f"patch_size must have {image.dim() - 1} entries of at least 1 for image {tuple(image.shape)}, "
            f"got {tuple(patch_size)}"
        )
    if not 0 <= overlap < 1:
        raise UsageError(f"overlap must be at least 0 and below 1, got {overlap}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
