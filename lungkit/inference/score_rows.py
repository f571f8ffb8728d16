"""What one trained model says of every voxel of a scan, a few slices at a time, on the scan's own grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lungkit.data.volume import Volume
from lungkit.errors import UsageError
from lungkit.inference.precision import Precision, autocast
from lungkit.inference.predict import stream_case
from lungkit.inference.rows import CHUNK_VOXELS, ResampledRows, Rows, ScanRows, StreamedRows, chunks
from lungkit.inference.sliding_window import Progress, first_output
from lungkit.inference.trained_model import TrainedModel
from lungkit.inference.windows_plan import Tile, smaller_tiles, windows_per_call
from lungkit.nn import AttentionUNet
from lungkit.nn.convolution import CHANNELS_LAST


@dataclass(frozen=True)
class Windowing:
    """How windows are laid and computed; see :class:`lungkit.inference.Predictor` for the options."""

    overlap: float = 0.5
    mirror: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise UsageError(f"overlap must be at least 0 and below 1, got {self.overlap}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}")

    def batch_on(self, device: torch.device, tile: Tile, plane: Sequence[int]) -> int:
        """Windows in one call, for a scan whose slices have the shape ``plane``."""
        if self.batch_size is not None:
            return self.batch_size
        voxels = math.prod(plane) if tile.whole_slices else math.prod(tile.patch_size)
        return windows_per_call(device.type, voxels)


def score_rows(
    model: TrainedModel,
    volumes: Sequence[Volume],
    extent: tuple[int, int, int],
    windowing: Windowing,
    device: torch.device,
    precision: Precision,
    *,
    as_logits: bool = False,
    attention: bool = False,
    halvings: int = 0,
    progress: Progress | None = None,
) -> Rows:
    """Probabilities (K, Z, Y, X) on the grid of ``extent`` that the scan has as canonically oriented.

    Args:
        model: its network is moved to ``device``.
        volumes: the channels of the scan.
        extent: (Z, Y, X).
        windowing: how.
        device: where the network runs and logits are added up.
        precision: number format of the network.
        as_logits: give the logits, as many as the network has outputs; not where they would have to be resampled.
        attention: give the attention map of the finest gate as one channel more.
        halvings: of the windows, see :func:`smaller_tiles`.
        progress: called with the windows done and the windows in all.

    Raises:
        NotFiniteError: as the rows are read: a logit is NaN or infinite.
    """
    geometry = model.geometry_of(volumes[0])
    tile = smaller_tiles(Tile.of(model), geometry.shape, halvings)
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

    parts = stream_case(
        _mirrored(logits_of, model.dims) if windowing.mirror else logits_of,
        ScanRows(volumes, model.preprocessing, geometry),
        tile.patch_size,
        windowing.overlap,
        windowing.batch_on(device, tile, geometry.shape[1:]),
        tile.whole_slices,
        model.context_slices,
        progress,
        module=network,
    )
    parts = _finite(parts, model.name)
    shape = (len(model.labels) + attention, *geometry.shape)
    if as_logits:
        return StreamedRows(parts, shape)
    probabilities = (
        (first, last, _probabilities(logits, attention)) for first, last, logits in _in_pieces(parts)
    )
    rows = StreamedRows(probabilities, shape)
    return rows if geometry.shape == extent else ResampledRows(rows, extent)


def _mirrored(network: Callable[[Tensor], Tensor], dims: int) -> Callable[[Tensor], Tensor]:
    """Mean of the network's output over all mirror images of its input."""
    flips = [[axis + 2 for axis in range(dims) if code >> axis & 1] for code in range(2**dims)]

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
    """The same rows in pieces small enough to be worked on without much memory."""
    for first, last, rows in parts:
        for low, high in chunks(last - first, rows[:, 0].numel(), most_voxels=CHUNK_VOXELS):
            yield first + low, first + high, rows[:, low:high]


def _probabilities(logits: Tensor, attention: bool) -> Tensor:
    """Softmax of the logits, of a single one its sigmoid and the rest to 1; an attention map behind them stays."""
    outputs = logits.shape[0] - attention
    if outputs == 1:
        foreground = logits[:1].sigmoid()
        return torch.cat([1 - foreground, foreground, logits[1:]])
    return torch.cat([logits[:outputs].softmax(0), logits[outputs:]])
