"""What trained models say of every voxel of a scan, a few slices at a time, on the scan's own grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lungkit.data.geometry import Geometry
from lungkit.data.preprocessing import ScanSlices
from lungkit.data.scan_statistics import Box, cropped, nonzero_box
from lungkit.data.slices import PlacedSlices, ResampledSlices, Slices, StreamedSlices, chunks
from lungkit.data.volume import Volume
from lungkit.inference.patches import patches_per_call, prediction_patch, smaller_patch
from lungkit.inference.precision import Precision, autocast
from lungkit.inference.sliding_window import Progress, first_output, stream_logits
from lungkit.inference.trained_model import TrainedModel
from lungkit.nn import AttentionUNet
from lungkit.nn.convolution import CHANNELS_LAST


def scan_scores(
    model: TrainedModel,
    volumes: Sequence[Volume],
    device: torch.device,
    precision: Precision,
    *,
    overlap: float = 0.5,
    mirror: bool = False,
    batch_size: int | None = None,
    as_logits: bool = False,
    attention: bool = False,
    halvings: int = 0,
    progress: Progress | None = None,
) -> Slices:
    """Probabilities (K, Z, Y, X) on the scan's own grid, its axes as the model sees them (RAS+ of lungkit's models).

    Args:
        model: its network is moved to ``device``.
        volumes: the channels of the scan.
        device: where the network runs and logits are added up.
        precision: number format of the network.
        overlap: of neighbouring patches.
        mirror: average over the mirror images of every patch.
        batch_size: patches in one call; None is as many as the device is fastest with.
        as_logits: give the logits, as many as the network has outputs.
        attention: give the attention map of the finest gate as one channel more.
        halvings: of the patches, see :func:`smaller_patch`.
        progress: see :data:`Progress`.

    Raises:
        NotFiniteError: as the slices are read: a logit is NaN or infinite.
    """
    whole = model.own_grid_of(volumes[0])
    box = nonzero_box(volumes) if model.preprocessing.crop == "nonzero" else None
    if box is not None:
        volumes = [cropped(volume, box) for volume in volumes]
    geometry = model.geometry_of(volumes[0])
    patch = smaller_patch(
        prediction_patch(model.patch_size, geometry.shape, whole_slices=model.tiling.whole_slices), halvings
    )
    network = model.network.to(device)
    network = network.to(memory_format=CHANNELS_LAST[model.dims])  # type: ignore[call-overload]

    def logits_of(patches: Tensor) -> Tensor:
        with autocast(device.type, precision):
            if not attention:
                return first_output(network(patches)).float()
            logits, gates = cast(AttentionUNet, network)(patches, return_attention=True)
            finest = max(gates, key=lambda gate: gate[0].numel()).float()
            mode = "bilinear" if patches.dim() == 4 else "trilinear"
            full = F.interpolate(finest, size=patches.shape[2:], mode=mode)
            return torch.cat([first_output(logits).float(), full], 1)

    parts = stream_logits(
        _mirrored(logits_of, model.mirror_axes[: model.dims]) if mirror else logits_of,
        ScanSlices(volumes, model.preprocessing, geometry),
        patch,
        overlap=overlap,
        batch_size=batch_size or patches_per_call(device.type, patch),
        context_slices=model.context_slices,
        tiling=model.tiling,
        progress=progress,
        module=network,
    )
    parts = _finite(parts, model.name)
    regions = model.regions is not None
    channels = int(model.description["model"]["out_channels"]) if as_logits else len(model.labels)
    if not as_logits:
        parts = (
            (first, last, class_probabilities(logits, attention, regions=regions))
            for first, last, logits in _in_pieces(parts)
        )
    slices: Slices = StreamedSlices(parts, (channels + attention, *geometry.shape))
    if geometry.shape != geometry.oriented_shape:
        own, target = model.preprocessing.spacings_mm(volumes[0])
        filters = model.preprocessing.score_interpolation.filters(target, own)
        slices = ResampledSlices(slices, geometry.oriented_shape, filters)
    if box is None or geometry.oriented_shape == whole.oriented_shape:
        return slices
    return PlacedSlices(
        slices, whole.oriented_shape, _corner(box, whole), _background(channels, as_logits, regions)
    )


def ensemble_scores(
    models: Sequence[TrainedModel],
    volumes: Sequence[Volume],
    device: torch.device,
    precision: Precision,
    *,
    as_logits: bool = False,
    attention: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[tuple[int, int, Tensor]]:
    """Mean of :func:`scan_scores` over the models, a block of slices at a time; of the maps over those with gates.

    Where the models say so, the mean is that of their logits, whether these or probabilities are asked for.

    Yields:
        ``(first, last, scores)`` of slices ``first`` to ``last`` - 1.
    """
    steps = _Steps(progress, len(models))
    mean_of_logits = as_logits or models[0].averaging == "logits"
    regions = models[0].regions is not None
    streams = [
        scan_scores(
            model,
            volumes,
            device,
            precision,
            as_logits=mean_of_logits,
            attention=attention and model.has_attention,
            progress=steps.of(index),
            **options,
        )
        for index, model in enumerate(models)
    ]
    classes = streams[0].shape[0] - (attention and models[0].has_attention)
    _, depth, *plane = streams[0].shape
    for first, last in chunks(depth, math.prod(plane) * classes):
        scores = [stream.read(first, last) for stream in streams]
        mean = scores[0]
        if len(scores) > 1:
            mean = _mean([slices[:classes] for slices in scores])
            if attention:
                mean = torch.cat(
                    [mean, _mean([slices[classes:] for slices in scores if len(slices) > classes])]
                )
        if mean_of_logits and not as_logits:
            mean = class_probabilities(mean, attention, regions=regions)
        yield first, last, mean


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0] / len(tensors)
    for tensor in tensors[1:]:
        total += tensor / len(tensors)
    return total


class _Steps:
    """One count of patches over several models that run side by side."""

    def __init__(self, progress: Progress | None, models: int) -> None:
        self._progress = progress
        self._counts = [(0, 0)] * models

    def of(self, index: int) -> Progress | None:
        """Progress of one model."""
        report = self._progress
        if report is None:
            return None

        def step(done: int, total: int) -> None:
            self._counts[index] = done, total
            known = [count for _, count in self._counts if count]
            # A model that has not begun is taken to be as large as the others.
            report(sum(done for done, _ in self._counts), sum(known) * len(self._counts) // len(known))

        return step


def _corner(box: Box, geometry: Geometry) -> tuple[int, int, int]:
    """Where a box of the stored array begins in the axes (Z, Y, X) of ``geometry``."""
    corner = [0, 0, 0]
    for length, part, axis, flip in zip(
        geometry.original_shape, box, geometry.axes, geometry.flips, strict=True
    ):
        corner[2 - axis] = length - part.stop if flip else part.start
    return corner[0], corner[1], corner[2]


def _background(channels: int, logits: bool, regions: bool) -> Tensor:
    """Scores of what is background for sure."""
    scores = torch.full((channels,), -math.inf if logits else 0.0)
    if channels > 1 and not (logits and regions):
        scores[0] = 0.0 if logits else 1.0
    return scores


def _mirrored(network: Callable[[Tensor], Tensor], mirror_axes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Mean of the network's output over all mirror images of its input along ``mirror_axes``."""
    flips = [
        [axis + 2 for bit, axis in enumerate(mirror_axes) if code >> bit & 1]
        for code in range(2 ** len(mirror_axes))
    ]

    def mean(patches: Tensor) -> Tensor:
        total = network(patches)
        for axes in flips[1:]:
            total = total + network(patches.flip(axes)).flip(axes)
        return total / len(flips)

    return mean


class NotFiniteError(ArithmeticError):
    """A network gave NaN or infinity; the message is the model's name."""


def _finite(parts: Iterator[tuple[int, int, Tensor]], name: str) -> Iterator[tuple[int, int, Tensor]]:
    for first, last, logits in parts:
        if not math.isfinite(logits.sum()):  # one value that is not finite makes the sum so
            raise NotFiniteError(name)
        yield first, last, logits


def _in_pieces(parts: Iterator[tuple[int, int, Tensor]]) -> Iterator[tuple[int, int, Tensor]]:
    """The same slices in pieces small enough to be worked on without much memory."""
    for first, last, slices in parts:
        for low, high in chunks(last - first, slices[:, 0].numel()):
            yield first + low, first + high, slices[:, low:high]


def class_probabilities(logits: Tensor, attention: bool = False, *, regions: bool = False) -> Tensor:
    """Softmax of the logits, of a single one its sigmoid and the rest to 1; an attention map behind them stays.

    Of ``regions`` each has its own sigmoid, and the background what the likeliest of them leaves.
    """
    outputs = logits.shape[0] - attention
    if regions:
        inside = logits[:outputs].sigmoid()
        return torch.cat([1 - inside.amax(0, keepdim=True), inside, logits[outputs:]])
    if outputs == 1:
        foreground = logits[:1].sigmoid()
        return torch.cat([1 - foreground, foreground, logits[1:]])
    return torch.cat([logits[:outputs].softmax(0), logits[outputs:]])
