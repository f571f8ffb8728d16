"""Pictures of a case: CT slice, true contour, predicted contour, attention map."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lungkit._atomic import atomic_path
from lungkit.errors import UsageError
from lungkit.report._drawing import (
    BACKGROUND,
    CLASS_COLOURS,
    FAINT,
    TEXT,
    TRUTH_COLOUR,
    ArrayLike,
    Box,
    as_array,
    as_seen,
    crop_box,
    draw_contours,
    draw_frame,
    draw_scale_bar,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        attention: alpha (Y, X) of the slice at the finest level, between 0 and 1; or several by the name of the
            model. Shown over the CT, which it covers the more the larger it is.
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

    scan = as_array(image)
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
    scan, true = as_seen(scan), as_seen(true)
    predictions = {name: as_seen(labels) for name, labels in predictions.items()}
    attentions = {name: as_seen(as_array(alpha)) for name, alpha in attentions.items()}

    masks = [true[z], *(labels[z] for labels in predictions.values())]
    ct = np.asarray(scan[z], dtype=np.float32)
    box = crop_box(np.logical_or.reduce([mask != 0 for mask in masks]))
    low, high = window if window is not None else (float(ct.min()), float(ct.max()))
    columns = 2 + len(predictions) + len(attentions)
    spacing = (float(spacing_mm[1]), float(spacing_mm[2])) if spacing_mm is not None else None
    aspect = spacing[0] / spacing[1] if spacing else 1.0

    figure = Figure(figsize=(3.1 * columns, 3.55), dpi=130, facecolor=BACKGROUND, layout="constrained")
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
        ax.set_title(heading, color=TEXT, fontsize=11, parse_math=False)
        ax.set_axis_off()
        return ax

    whole = (slice(0, ct.shape[0]), slice(0, ct.shape[1]))
    ax = panel("CT", whole)
    if box != whole:
        draw_frame(ax, box)
    if spacing is not None:
        draw_scale_bar(ax, whole, spacing)
    ax = panel("Truth", box)
    draw_contours(ax, true[z][box], colours=(TRUTH_COLOUR, *CLASS_COLOURS[1:]), width=1.8)
    if spacing is not None and box != whole:
        draw_scale_bar(ax, box, spacing)
    for name, labels in predictions.items():
        ax = panel(name or "Prediction", box)
        draw_contours(ax, true[z][box], colours=(TRUTH_COLOUR,), width=1.0, dashed=True)
        draw_contours(ax, labels[z][box], colours=CLASS_COLOURS, width=1.8)
        if name in attentions:
            ax = panel(f"{f'{name}: attention' if name else 'Attention'}\n(finest level)", box)
            alpha = np.asarray(as_array(attentions[name]), dtype=np.float32)[box]
            shown = ax.imshow(
                alpha,
                cmap="inferno",
                vmin=0,
                vmax=1,
                alpha=0.1 + 0.6 * alpha.clip(0, 1),  # where there is no attention the CT is seen
                aspect=aspect,
                interpolation="nearest",
            )
            draw_contours(ax, true[z][box], colours=("#ffffff",), width=1.0, dashed=True)
            bar = figure.colorbar(shown, ax=ax, fraction=0.045, pad=0.02, ticks=[0, 0.5, 1])
            bar.ax.tick_params(colors=FAINT, labelsize=8, length=0)
            bar.outline.set_visible(False)
    heading = " · ".join(filter(None, [title, f"slice {z + 1} of {len(scan)}"]))
    figure.suptitle(heading, color=TEXT, fontsize=12, parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, facecolor=BACKGROUND)


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
    array = as_array(labels)
    return array if ignore_index is None else np.where(array == ignore_index, 0, array)
