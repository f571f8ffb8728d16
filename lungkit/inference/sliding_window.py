"""Sliding-window inference: overlapping patches, Gaussian weights, memory for one slab at a time."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.inference.rows import Rows, TensorRows, move_up, recent, smallest

_LOG = logging.getLogger("lungkit")

Network = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
"""Maps patches (B, C, \\*patch) to logits (B, K, \\*patch), or to a tuple of which they are the first."""

Weighting = Literal["gaussian", "constant"]
"""How much a patch counts at each of its voxels."""

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
    weighting: Weighting = "gaussian",
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
        weighting: "gaussian", or "constant" for the plain mean of the patches that hold a voxel.
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
        network,
        image,
        patch_size,
        overlap=overlap,
        batch_size=batch_size,
        weighting=weighting,
        progress=progress,
    ):
        if logits is None:
            logits = slab.new_empty((slab.shape[0], *image.shape[1:]))
        logits[:, first:last] = slab
    if logits is None:  # stream_logits refuses empty images, so that there is at least one slab
        raise UsageError(f"image of shape {tuple(image.shape)} is empty")
    return logits


def stream_logits(
    network: Network,
    image: Tensor | Rows,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    weighting: Weighting = "gaussian",
    progress: Progress | None = None,
    module: object | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    r"""The logits of :func:`sliding_window` slab by slab along the first axis, as each is finished.

    Only one slab, as deep as a patch, is in memory, so that the classes of a long scan need no float volume; an image
    given as :class:`~lungkit.inference.rows.Rows` is not held whole either. Where ``network`` is a function round a
    module, ``module`` says which: its mode and device are used.

    A GPU that is out of memory gets half the batch from then on, down to one patch.

    Yields:
        ``(first, last, logits)``: float32 (K, last - first, \*S[1:]), a view that the next step overwrites, on the
        device of a tensor or, for rows, of the network. The slabs follow one another and cover the first axis.
    """
    _check_arguments(image, patch_size, overlap, batch_size)
    if weighting not in ("gaussian", "constant"):
        raise UsageError(f"weighting must be 'gaussian' or 'constant', got {weighting!r}")
    rows = TensorRows(image) if isinstance(image, Tensor) else image
    of_network = device_of(module or network, torch.device("cpu"))
    device = rows.image.device if isinstance(rows, TensorRows) else of_network
    extent = tuple(rows.shape[1:])
    padded, before = padded_to(rows, patch_size)
    windows = [
        Windows(n, p, overlap, weighting, device) for n, p in zip(padded.shape[1:], patch_size, strict=True)
    ]
    product = torch.empty(tuple(patch_size), device=device)
    overlapping = any(bool((axis.weights != 1).any()) for axis in windows)
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
    for index, patch in _run_patches(
        network, module or network, recent(padded), windows, batch_size, progress
    ):
        starts = [axis.starts[i] for axis, i in zip(windows, index, strict=True)]
        if slab is None:
            slab = torch.zeros((patch.shape[0], patch_size[0], *padded.shape[2:]), device=device)
        if starts[0] > at:
            step = starts[0] - at
            yield from finished(at, at + step, slab[:, :step])
            # No patch to come reaches back over its own start: the rest moves up, and zeros follow.
            rest = max(0, slab.shape[1] - step)
            move_up(slab, step, rest)
            slab[:, rest:] = 0
            at = starts[0]
        target = (
            slice(None),
            slice(None),
            *(slice(s, s + p) for s, p in zip(starts[1:], patch_size[1:], strict=True)),
        )
        if overlapping:
            _outer([axis.weights[i] for axis, i in zip(windows, index, strict=True)], out=product)
            slab[target].addcmul_(patch.to(device, torch.float32), product)
        else:
            slab[target] = patch  # which holds all its voxels alone
    if slab is not None:
        yield from finished(at, at + slab.shape[1], slab)


class Windows:
    """Where patches lie along one axis, and how much each counts at each of its voxels.

    Attributes:
        starts: first voxel of every patch.
        weights: for every patch its Gaussian (or 1), divided by the sum of those of all patches at the voxel: the
            weights of the patches that hold a voxel add up to 1. Their products over the axes do so too, so that no
            volume of summed weights is needed, and a voxel that one patch alone holds takes its logits unchanged.
            float32 (number of patches, patch).
    """

    def __init__(
        self, extent: int, patch: int, overlap: float, weighting: Weighting, device: torch.device
    ) -> None:
        self.starts = window_starts(extent, patch, overlap=overlap)
        own = (gaussian_weights(patch) if weighting == "gaussian" else torch.ones(patch)).double()
        total = torch.zeros(extent, dtype=torch.float64)
        for start in self.starts:
            total[start : start + patch] += own
        weights = torch.stack([own / total[start : start + patch] for start in self.starts])
        self.weights = weights.float().to(device)


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
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block, for each of ``modules``; its own mode is put back after it."""
    # Each module's own mode is kept, since parts of a network may have been frozen on purpose.
    training = [module for module in modules if module.training]
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
    rows: Rows,
    windows: Sequence[Windows],
    batch_size: int,
    progress: Progress | None,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Every window's index on the grid and its logits, in the order of the grid."""
    grid = list(itertools.product(*(range(len(axis.starts)) for axis in windows)))
    depth = windows[0].weights.shape[1]
    # Listed once, since finding a network's modules takes longer than looking at them.
    modules = [*module.modules()] if isinstance(module, nn.Module) else []
    done = 0
    while done < len(grid):
        indices = grid[done : done + batch_size]
        first = windows[0].starts[indices[0][0]]
        part = rows.read(first, windows[0].starts[indices[-1][0]] + depth)
        patches = torch.stack([part[_window(windows, index, first)] for index in indices])
        patches = patches.to(device_of(module, patches.device))
        try:
            # Entered for each batch and not round the loop: a generator must not hold the caller in no_grad.
            with evaluation_mode(modules):
                logits = first_output(network(patches))
        except torch.OutOfMemoryError:
            if len(indices) == 1:
                raise
            batch_size = len(indices) // 2
            _LOG.warning("the GPU is out of memory: %d patches at a time from here on", batch_size)
            continue
        if (
            logits.dim() != patches.dim()
            or logits.shape[2:] != patches.shape[2:]
            or len(logits) != len(indices)
        ):
            raise UsageError(
                f"the network gave logits {tuple(logits.shape)} for patches {tuple(patches.shape)}; "
                "logits must be (B, K, *patch) over the same batch and voxels"
            )
        yield from zip(indices, logits, strict=True)
        done += len(indices)
        if progress is not None:
            progress(done, len(grid))


def first_output(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The logits at full resolution: the output itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def _window(windows: Sequence[Windows], index: Sequence[int], first_row: int) -> tuple[slice, ...]:
    """Where a window lies in rows that begin at ``first_row``."""
    starts = [axis.starts[i] for axis, i in zip(windows, index, strict=True)]
    starts[0] -= first_row
    return (slice(None), *(slice(s, s + w.weights.shape[1]) for s, w in zip(starts, windows, strict=True)))


def _outer(axes: Sequence[Tensor], *, out: Tensor) -> None:
    """Their outer product, into memory that every window uses again."""
    first, *others, last = axes
    for weights in others:
        first = first.unsqueeze(-1) * weights
    torch.mul(first.unsqueeze(-1), last, out=out)


def padded_to(rows: Rows, patch_size: Sequence[int]) -> tuple[Rows, list[int]]:
    """Rows grown evenly to at least the patch size with the smallest value of each channel.

    Returns:
        The rows, themselves where they are large enough, and the voxels added before each axis.
    """
    missing = [max(0, p - n) for n, p in zip(rows.shape[1:], patch_size, strict=True)]
    before = [m // 2 for m in missing]
    return (_PaddedRows(rows, missing, before) if any(missing) else rows), before


class _PaddedRows:
    def __init__(self, rows: Rows, missing: Sequence[int], before: Sequence[int]) -> None:
        self._rows, self._before = rows, before
        self._air = smallest(rows)
        self.shape = (rows.shape[0], *(n + m for n, m in zip(rows.shape[1:], missing, strict=True)))

    def read(self, first: int, last: int) -> Tensor:
        """Rows of the grown image."""
        depth = self._rows.shape[1]
        low, high = (min(max(row - self._before[0], 0), depth) for row in (first, last))
        inner = self._rows.read(low, high)
        air = self._air.to(inner).reshape(-1, *(1,) * (inner.dim() - 1))
        grown = air.expand(-1, last - first, *self.shape[2:]).clone()
        at = low + self._before[0] - first
        sides = zip(self._before[1:], inner.shape[2:], strict=True)
        inside = (slice(None), slice(at, at + high - low), *(slice(b, b + n) for b, n in sides))
        grown[inside] = inner
        return grown


def _check_arguments(
    image: Tensor | Rows, patch_size: Sequence[int], overlap: float, batch_size: int
) -> None:
    shape = tuple(image.shape)
    if len(shape) not in (3, 4):
        raise UsageError(f"image must be (C, Y, X) or (C, Z, Y, X), got shape {shape}")
    if math.prod(shape) == 0:
        raise UsageError(f"image of shape {shape} is empty")
    if isinstance(image, Tensor) and not image.is_floating_point():
        raise UsageError(f"image must be floating point and normalised, got {image.dtype}")
    if len(patch_size) != len(shape) - 1 or min(patch_size) < 1:
        raise UsageError(
            f"patch_size must have {len(shape) - 1} entries of at least 1 for image {shape}, "
            f"got {tuple(patch_size)}"
        )
    if not 0 <= overlap < 1:
        raise UsageError(f"overlap must be at least 0 and below 1, got {overlap}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
