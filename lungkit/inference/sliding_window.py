"""Sliding-window inference: overlapping patches, Gaussian weights, memory for one slab at a time."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lungkit.data.slices import ContextSlices, PaddedSlices, Slices, TensorSlices, buffered, move_up
from lungkit.errors import UsageError
from lungkit.inference.patches import TILING, PatchAxis, Tiling, Weighting
from lungkit.inference.postprocessing import classes_from_logits, classes_from_regions

_LOG = logging.getLogger("lungkit")

Network = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
"""Maps patches (B, C, \\*patch) to logits (B, K, \\*patch), or to a tuple of which they are the first."""

Progress = Callable[[int, int], None]
"""Called with the patches done and the patches in all."""


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

    Patches lie on an even grid that covers the image (:func:`~lungkit.inference.patch_starts`). The logits of a voxel
    are the mean over the patches that hold it, weighted by a Gaussian round each patch's centre with sigma = patch / 8
    along every axis, so that the borders of a patch, where the network sees least context, count least (Isensee et al.
    2021, "nnU-Net", Nature Methods 18:203). An image smaller than the patch is padded evenly on both sides with the
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
        weighting: "gaussian", "voxel-gaussian" (centred on a voxel), or "constant" for the plain mean of the patches
            that hold a voxel.
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
        tiling=Tiling(weighting=weighting),
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
    image: Tensor | Slices,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    context_slices: int = 0,
    tiling: Tiling = TILING,
    progress: Progress | None = None,
    module: object | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    r"""The logits of :func:`sliding_window` slab by slab along the first axis, as each is finished.

    Only one slab, as deep as a patch, is in memory, so that the classes of a long scan need no float volume; an image
    given as :class:`~lungkit.data.slices.Slices` is not held whole either. A ``patch_size`` (Y, X) on a volume is
    that of a 2D network, which sees one axial slice at a time, with ``context_slices`` on either side as channels.
    Where ``network`` is a function round a module, ``module`` says which: its mode and device are used.

    ``tiling`` says how patches lie and count, but for ``whole_slices``, which is for who chooses the patch size.

    A GPU that is out of memory gets half the batch from then on, down to one patch.

    Yields:
        ``(first, last, logits)``: float32 (K, last - first, \*S[1:]), a view that the next step overwrites, on the
        device of a tensor or, for slices, of the network. The slabs follow one another and cover the first axis.
    """
    _check_arguments(image, patch_size, overlap, batch_size, context_slices)
    slices = TensorSlices(image) if isinstance(image, Tensor) else image
    module = module or network
    device = (
        slices.image.device if isinstance(slices, TensorSlices) else device_of(module, torch.device("cpu"))
    )
    # To the sliding window a 2D network is a 3D one whose patches are one slice deep.
    if len(patch_size) < len(slices.shape) - 1:
        patch_size, network = (1, *patch_size), _slicewise(network)
        slices = ContextSlices(slices, context_slices) if context_slices else slices
    extent = tuple(slices.shape[1:])
    missing = [max(0, p - n) for n, p in zip(extent, patch_size, strict=True)]
    before = [m // 2 for m in missing]
    value = 0.0 if tiling.padding == "zero" else None
    padded = PaddedSlices(slices, missing, before, value) if any(missing) else slices
    axes = [
        PatchAxis(n, p, overlap, tiling.weighting, device, whole_steps=tiling.whole_steps)
        for n, p in zip(padded.shape[1:], patch_size, strict=True)
    ]
    product = torch.empty(tuple(patch_size), device=device)
    overlapping = any(bool((axis.weights != 1).any()) for axis in axes)
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
    for index, patch in _run_patches(network, module, buffered(padded), axes, batch_size, progress):
        starts = [axis.starts[i] for axis, i in zip(axes, index, strict=True)]
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
            _outer([axis.weights[i] for axis, i in zip(axes, index, strict=True)], out=product)
            slab[target].addcmul_(patch.to(device, torch.float32), product)
        else:
            slab[target] = patch  # which holds all its voxels alone
    if slab is not None:
        yield from finished(at, at + slab.shape[1], slab)


def predict_label(
    network: Network,
    image: Tensor | Slices,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    context_slices: int = 0,
    region_sequence: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Class of every voxel of a volume on the grid that the network sees.

    A voxel gets the class of its largest logit (the lowest class of a tie); a network with one output channel is a
    sigmoid model, class 1 where the logit is positive. Logits are kept for one slab at a time. What leads to a mask of
    a scan, on its own grid, is :class:`~lungkit.inference.Predictor`.

    Args:
        network: see :func:`sliding_window`.
        image: (C, Z, Y, X), a float tensor or read a few slices at a time.
        patch_size: (Z, Y, X) for a 3D network; (Y, X) for a 2D one, which sees one axial slice at a time. A slice that
            is no larger than the patch takes one call, ``batch_size`` slices together.
        overlap: as for :func:`sliding_window`.
        batch_size: as for :func:`sliding_window`.
        context_slices: slices on either side that a 2D network takes as channels, see
            :class:`~lungkit.data.slices.ContextSlices`.
        region_sequence: of a network that gives regions, see
            :func:`lungkit.inference.postprocessing.classes_from_regions`; a region is where its logit is positive.
        progress: see :data:`Progress`.

    Returns:
        uint8 (Z, Y, X) on the device of a tensor or, for slices, of the network.

    Raises:
        UsageError: an argument is out of its range, or the network has more than 256 classes.

    Example:
        >>> image = torch.tensor([[[[0.0, 2.0, -1.0], [3.0, 0.5, -2.0]]]])
        >>> predict_label(lambda x: torch.cat([-x, x], 1), image, (2, 2)).tolist()
        [[[0, 1, 0], [1, 1, 0]]]
    """
    if len(image.shape) != 4:
        raise UsageError(f"image must be (C, Z, Y, X), got shape {tuple(image.shape)}")
    slabs = stream_logits(
        network,
        image,
        patch_size,
        overlap=overlap,
        batch_size=batch_size,
        context_slices=context_slices,
        progress=progress,
    )
    if region_sequence is None:
        return torch.cat([classes_from_logits(logits) for _, _, logits in slabs])
    return torch.cat(
        [classes_from_regions(logits.sigmoid(), region_sequence, None) for _, _, logits in slabs]
    )


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
    slices: Slices,
    axes: Sequence[PatchAxis],
    batch_size: int,
    progress: Progress | None,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Every patch's index on the grid and its logits, in the order of the grid."""
    grid = list(itertools.product(*(range(len(axis.starts)) for axis in axes)))
    depth = axes[0].weights.shape[1]
    # Listed once, since finding a network's modules takes longer than looking at them.
    modules = [*module.modules()] if isinstance(module, nn.Module) else []
    done = 0
    while done < len(grid):
        indices = grid[done : done + batch_size]
        first = axes[0].starts[indices[0][0]]
        part = slices.read(first, axes[0].starts[indices[-1][0]] + depth)
        patches = torch.stack([part[_voxels_of(axes, index, first)] for index in indices])
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


def _slicewise(network: Network) -> Network:
    """A 2D network on patches (B, C, 1, Y, X)."""
    return lambda patches: first_output(network(patches.squeeze(2))).unsqueeze(2)


def _voxels_of(axes: Sequence[PatchAxis], index: Sequence[int], first_slice: int) -> tuple[slice, ...]:
    """Where a patch lies in slices that begin at ``first_slice``."""
    starts = [axis.starts[i] for axis, i in zip(axes, index, strict=True)]
    starts[0] -= first_slice
    return (slice(None), *(slice(s, s + axis.weights.shape[1]) for s, axis in zip(starts, axes, strict=True)))


def _outer(axes: Sequence[Tensor], *, out: Tensor) -> None:
    """Their outer product, into memory that every patch uses again."""
    first, *others, last = axes
    for weights in others:
        first = first.unsqueeze(-1) * weights
    torch.mul(first.unsqueeze(-1), last, out=out)


def _check_arguments(
    image: Tensor | Slices, patch_size: Sequence[int], overlap: float, batch_size: int, context_slices: int
) -> None:
    shape = tuple(image.shape)
    if len(shape) not in (3, 4):
        raise UsageError(f"image must be (C, Y, X) or (C, Z, Y, X), got shape {shape}")
    if math.prod(shape) == 0:
        raise UsageError(f"image of shape {shape} is empty")
    if isinstance(image, Tensor) and not image.is_floating_point():
        raise UsageError(f"image must be floating point and normalised, got {image.dtype}")
    dims = (2,) if len(shape) == 3 else (2, 3)
    if len(patch_size) not in dims or min(patch_size) < 1:
        raise UsageError(
            f"patch_size must have {' or '.join(map(str, dims))} entries of at least 1 for image {shape}, "
            f"got {tuple(patch_size)}"
        )
    if not 0 <= overlap < 1:
        raise UsageError(f"overlap must be at least 0 and below 1, got {overlap}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    if context_slices and (context_slices < 0 or (len(shape), len(patch_size)) != (4, 2)):
        raise UsageError(
            f"context_slices must be 0 or more, and is for 2D networks on volumes, got {context_slices} for patches "
            f"{tuple(patch_size)} of image {shape}"
        )
