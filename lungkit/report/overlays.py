"""Pictures of a case: CT slice, true contour, predicted contour, attention map."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from lungkit._atomic import atomic_path
from lungkit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ArrayLike = np.ndarray | Tensor
Box = tuple[slice, slice]

_BACKGROUND = "#101214"
_TEXT = "#e8e8e8"
_FAINT = "#9aa0a6"
_CLASS_COLOURS = ("#ff6b4a", "#4aa8ff", "#c77dff", "#ffd166", "#06d6a0", "#f78fb3")
_TRUTH_COLOUR = "#3ddc84"
_MINIMUM_CROP = 48
_SCALE_BARS_MM = (5, 10, 20, 50, 100)


def choose_slice(
    truth: ArrayLike, prediction: ArrayLike | None = None, *, ignore_index: int | None = None
) -> int:
    """The axial slice that shows a case: the one with most true foreground, the lowest of a tie.

    Without true foreground it is the slice with most predicted foreground; without any, the middle one.

    Args:
        truth: labels (Z, Y, X), foreground where not 0.
        prediction: labels (Z, Y, X).
        ignore_index: label that is not foreground.

    Example:
        >>> truth = np.zeros((3, 4, 4), np.uint8)
        >>> truth[2, 1:3, 1:3] = 1
        >>> choose_slice(truth), choose_slice(np.zeros((3, 4, 4), np.uint8))
        (2, 1)
    """
    for labels in (truth, prediction):
        if labels is not None:
            area = (_foreground(labels, ignore_index) != 0).sum(axis=(1, 2))
            if area.any():
                return int(area.argmax())
    return truth.shape[0] // 2


def save_overlays(
    path: str | os.PathLike[str],
    image: ArrayLike,
    truth: ArrayLike,
    prediction: ArrayLike | Mapping[str, ArrayLike],
    attention: ArrayLike | Mapping[str, ArrayLike] | None = None,
    *,
    slice_index: int | None = None,
    spacing_mm: Sequence[float] | None = None,
    window: tuple[float, float] | None = None,
    ignore_index: int | None = None,
    title: str | None = None,
) -> None:
    """Draw one slice of a case as a row of panels: CT, truth, then prediction and attention map of every model.

    Truth is outlined in green; a prediction in colour, over a dashed line for the truth. Where the foreground fills
    little of the slice, the panels beside the CT show the part round it, framed in the CT; all masks are shown in the
    same part. A slice is shown as radiologists see it, front up and the patient's right on the left.

    Args:
        path: picture to write; its suffix (.png, .pdf, .svg) says which kind.
        image: (Z, Y, X) in RAS orientation, or (C, Z, Y, X) of which the first channel is shown.
        truth: labels (Z, Y, X).
        prediction: labels (Z, Y, X); or several of them by the name of the model.
        attention: alpha (Y, X) of the slice, between 0 and 1; or several by the name of the model.
        slice_index: z of the slice; :func:`choose_slice` where not given.
        spacing_mm: (z, y, x); sets the aspect ratio and draws a scale bar.
        window: lowest and highest intensity shown; the range of the slice where not given.
        ignore_index: label that is not foreground.
        title: heading of the picture; the slice is named after it.

    Raises:
        UsageError: shapes do not agree, or the slice does not exist.

    Example:
        >>> import pathlib, tempfile
        >>> mask = np.zeros((2, 32, 32), np.uint8)
        >>> mask[1, 8:16, 8:16] = 1
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> save_overlays(folder / "case.png", mask.astype(np.float32), mask, mask)
        >>> (folder / "case.png").stat().st_size > 1000
        True
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scan = _array(image)
    scan = scan[0] if scan.ndim == 4 else scan
    true = _foreground(truth, ignore_index)
    named = prediction if isinstance(prediction, Mapping) else {"": prediction}
    predictions = {name: _foreground(labels, ignore_index) for name, labels in named.items()}
    attentions: dict[str, ArrayLike]
    if attention is None:
        attentions = {}
    else:
        attentions = (
            dict(attention) if isinstance(attention, Mapping) else {next(iter(predictions)): attention}
        )
    _check_shapes(scan, true, predictions, attentions)
    first = next(iter(predictions.values()))
    z = choose_slice(true, first) if slice_index is None else slice_index
    if not 0 <= z < len(scan):
        raise UsageError(f"slice_index must be between 0 and {len(scan) - 1}, got {z}")

    # Arrays run to the patient's right and front; a radiologist sees the front up and the patient's right on the left.
    scan, true = _as_seen(scan), _as_seen(true)
    predictions = {name: _as_seen(labels) for name, labels in predictions.items()}
    attentions = {name: _as_seen(_array(alpha)) for name, alpha in attentions.items()}

    masks = [true[z], *(labels[z] for labels in predictions.values())]
    ct = np.asarray(scan[z], dtype=np.float32)
    box = _crop_box(np.logical_or.reduce([mask != 0 for mask in masks]))
    low, high = window if window is not None else (float(ct.min()), float(ct.max()))
    columns = 2 + len(predictions) + len(attentions)
    spacing = (float(spacing_mm[1]), float(spacing_mm[2])) if spacing_mm is not None else None
    aspect = spacing[0] / spacing[1] if spacing else 1.0

    figure = Figure(figsize=(3.1 * columns, 3.55), dpi=130, facecolor=_BACKGROUND, layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(1, columns, squeeze=False)[0])

    def panel(heading: str, crop: Box) -> Axes:
        ax = next(axes)
        ax.imshow(
            ct[crop],
            cmap="gray",
            vmin=low,
            vmax=max(high, low + 1e-6),
            aspect=aspect,
            interpolation="nearest",
        )
        ax.set_title(heading, color=_TEXT, fontsize=11)
        ax.set_axis_off()
        return ax

    whole = (slice(0, ct.shape[0]), slice(0, ct.shape[1]))
    ax = panel("CT", whole)
    if box != whole:
        _draw_frame(ax, box)
    if spacing is not None:
        _draw_scale_bar(ax, whole, spacing)
    ax = panel("Truth", box)
    _draw_contours(ax, true[z][box], colours=(_TRUTH_COLOUR, *_CLASS_COLOURS[1:]), width=1.8)
    if spacing is not None and box != whole:
        _draw_scale_bar(ax, box, spacing)
    for name, labels in predictions.items():
        ax = panel(name or "Prediction", box)
        _draw_contours(ax, true[z][box], colours=(_TRUTH_COLOUR,), width=1.0, dashed=True)
        _draw_contours(ax, labels[z][box], colours=_CLASS_COLOURS, width=1.8)
        if name in attentions:
            ax = panel(f"{name}: attention" if name else "Attention", box)
            alpha = np.asarray(_array(attentions[name]), dtype=np.float32)[box]
            shown = ax.imshow(
                alpha, cmap="inferno", vmin=0, vmax=1, alpha=0.75, aspect=aspect, interpolation="nearest"
            )
            _draw_contours(ax, true[z][box], colours=("#ffffff",), width=1.0, dashed=True)
            bar = figure.colorbar(shown, ax=ax, fraction=0.045, pad=0.02, ticks=[0, 0.5, 1])
            bar.ax.tick_params(colors=_FAINT, labelsize=8, length=0)
            bar.outline.set_visible(False)
    heading = " · ".join(filter(None, [title, f"slice {z + 1} of {len(scan)}"]))
    figure.suptitle(heading, color=_TEXT, fontsize=12)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, facecolor=_BACKGROUND)


def _as_seen(array: np.ndarray) -> np.ndarray:
    return array[..., ::-1, ::-1]


def _crop_box(mask: np.ndarray) -> Box:
    """The part of a slice to show: a square round the foreground, or everything where that is not much more."""
    height, width = mask.shape
    whole = (slice(0, height), slice(0, width))
    if not mask.any():
        return whole
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = min(max(2 * extent + 8, _MINIMUM_CROP), height, width)
    if side > 0.6 * max(height, width):
        return whole
    starts = [
        int(np.clip((hits[0] + hits[-1] + 1) // 2 - side // 2, 0, size - side))
        for hits, size in ((rows, height), (columns, width))
    ]
    return (slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side))


def _draw_contours(
    ax: Axes, mask: np.ndarray, *, colours: Sequence[str], width: float, dashed: bool = False
) -> None:
    for value in np.unique(mask[mask != 0]):
        colour = colours[(int(value) - 1) % len(colours)]
        # One voxel of nothing all round closes the line of a mask that reaches the border.
        inside = np.pad((mask == value).astype(np.float32), 1)
        rows, columns = np.arange(inside.shape[0]) - 1, np.arange(inside.shape[1]) - 1
        ax.contour(
            columns,
            rows,
            inside,
            levels=[0.5],
            colors=[colour],
            linewidths=width,
            linestyles="dashed" if dashed else "solid",
        )


def _draw_frame(ax: Axes, box: Box) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = box
    corner = (columns.start - 0.5, rows.start - 0.5)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#ffffff", linewidth=0.9, alpha=0.8))


def _draw_scale_bar(ax: Axes, box: Box, spacing: tuple[float, float]) -> None:
    height, width = (part.stop - part.start for part in box)
    fitting = [mm for mm in _SCALE_BARS_MM if mm / spacing[1] <= 0.4 * width]
    if not fitting:
        return
    from matplotlib.patheffects import withStroke

    length, y, x = fitting[-1] / spacing[1], 0.94 * height, 0.05 * width
    outline = [withStroke(linewidth=3.5, foreground="#000000b0")]  # readable on fat and bone too
    ax.plot(
        [x, x + length], [y, y], color="#ffffff", linewidth=2, solid_capstyle="butt", path_effects=outline
    )
    ax.text(
        x + length / 2,
        y - 0.02 * height,
        f"{fitting[-1]} mm",
        color="#ffffff",
        ha="center",
        va="bottom",
        fontsize=8,
        path_effects=outline,
    )


def _check_shapes(
    scan: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    attentions: Mapping[str, ArrayLike],
) -> None:
    if scan.ndim != 3:
        raise UsageError(f"image must be (Z, Y, X) or (C, Z, Y, X), got shape {scan.shape}")
    for name, labels in {
        "truth": truth,
        **{f"prediction {name}".rstrip(): p for name, p in predictions.items()},
    }.items():
        if labels.shape != scan.shape:
            raise UsageError(f"{name} {labels.shape} must have the image's shape {scan.shape}")
    for name, alpha in attentions.items():
        if name not in predictions:
            raise UsageError(f"attention is given for {name!r}, for which there is no prediction")
        if tuple(alpha.shape) != scan.shape[1:]:
            raise UsageError(f"attention {tuple(alpha.shape)} must have the slice's shape {scan.shape[1:]}")


def _foreground(labels: ArrayLike, ignore_index: int | None) -> np.ndarray:
    array = _array(labels)
    return array if ignore_index is None else np.where(array == ignore_index, 0, array)


def _array(values: ArrayLike) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
