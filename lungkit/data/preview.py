"""A picture of what augmentation does to training patches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lungkit._atomic import atomic_path
from lungkit.data.augment import AugmentConfig, Augmenter
from lungkit.data.augment.config import probability_fields
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELL_INCHES = 1.55
_NAME_INCHES = 1.9
_CONTOUR = "#ffb000"  # amber: apart from grey values, and told from them by colour-blind readers too


def save_augmentation_preview(
    path: str | os.PathLike[str],
    images: torch.Tensor,
    labels: torch.Tensor,
    config: AugmentConfig,
    *,
    seed: int = 0,
    samples: int = 5,
    spacing_mm: Sequence[float] | None = None,
    pad_value: float | None = None,
) -> Path:
    """Save a PNG grid: patches in columns; in rows the original, each transform alone, all as in training.

    A row of one transform applies it to every patch, with the strength of ``config``; transforms whose
    probability is zero have no row. The last row draws with the probabilities of ``config``. The contour of
    the foreground is drawn on top. Of 3D patches it shows the slice with the most foreground. All rows of a
    column share one grey scale, so that a change of brightness is seen.

    Args:
        path: file to write, ending with ``.png``; replaced whole or not at all.
        images: normalised patches (B, C, \\*S), of which the first channel is shown.
        labels: (B, \\*S) class indices.
        config: the augmentation.
        seed: for what is drawn.
        samples: how many patches to show, at most B.
        spacing_mm: voxel size in zyx order, as for :class:`Augmenter`.
        pad_value: normalised intensity of air, as for :class:`Augmenter`.

    Returns:
        ``path``.

    Raises:
        UsageError: no patch is given, the name is wrong, or the tensors do not fit together.
        ResourceError: the disk is full.

    Example:
        >>> import tempfile
        >>> images = torch.randn(2, 1, 32, 32)
        >>> labels = (images[:, 0] > 2).to(torch.uint8)
        >>> path = Path(tempfile.mkdtemp()) / "augmentation.png"
        >>> save_augmentation_preview(path, images, labels, AugmentConfig()).name
        'augmentation.png'
    """
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UsageError(f"path: {path} does not end with .png")
    if images.ndim not in (4, 5):
        raise UsageError(f"images is {tuple(images.shape)}; give (B, C, Y, X) or (B, C, Z, Y, X)")
    if samples < 1 or len(images) < 1:
        raise UsageError(f"samples is {samples} of {len(images)} images; give at least one of each")
    images, labels = images[:samples].detach().float().cpu(), labels[:samples].detach().cpu()

    rows = [("original", "", images, labels)]
    for name, strength, row_config in _row_configs(config):
        augmenter = Augmenter(row_config, images.ndim - 2, spacing_mm=spacing_mm, pad_value=pad_value)
        rows.append(
            (name, strength, *augmenter(images, labels, generator=torch.Generator().manual_seed(seed)))
        )

    columns = len(images)
    ratio = min(max(images.shape[-2] / images.shape[-1], 0.4), 2.5)
    width, height = _NAME_INCHES + columns * _CELL_INCHES, 0.35 + len(rows) * _CELL_INCHES * ratio
    figure = Figure(figsize=(width, height), facecolor="white")
    grid = figure.add_gridspec(
        len(rows),
        columns,
        left=_NAME_INCHES / width,
        right=1 - 0.08 / width,
        top=1 - 0.3 / height,
        bottom=0.05 / height,
        wspace=0.04,
        hspace=0.04,
    )
    figure.text(
        (_NAME_INCHES - 0.12) / width,
        1 - 0.26 / height,
        "contour: foreground",
        fontsize=8.5,
        color="#b87a00",
        ha="right",
    )
    for column in range(columns):
        low, high = np.percentile(images[column, 0].numpy(), (0.5, 99.8))
        for row, (name, strength, row_images, row_labels) in enumerate(rows):
            axes = figure.add_subplot(grid[row, column])
            _draw_patch(
                axes, row_images[column, 0].numpy(), row_labels[column].numpy(), low, max(high, low + 1e-6)
            )
            if row == 0:
                axes.set_title(f"patch {column + 1}", fontsize=9, color="0.35", pad=4)
            if column == 0:
                _name_row(axes, name, strength)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def _row_configs(config: AugmentConfig) -> list[tuple[str, str, AugmentConfig]]:
    """Name, strength and configuration of each row below the original."""
    rows = []
    if config.enabled:
        off: dict[str, Any] = dict.fromkeys(probability_fields(), 0.0)
        for field in probability_fields():
            if getattr(config, field) > 0:
                name = field.removesuffix("_probability")
                alone = dataclasses.replace(config, **{**off, field: 1.0})
                rows.append((name.replace("_", " "), _strength(config, name), alone))
    rows.append(("all", "as in training" if config.enabled else "disabled", config))
    return rows


def _strength(config: AugmentConfig, name: str) -> str:
    units = {"degrees": "°", "fraction": " of the patch", "sigma": " voxels", "displacement": " voxels"}
    for field in dataclasses.fields(config):
        prefix, _, quantity = field.name.rpartition("_")
        if prefix == name and isinstance(field.default, tuple):
            low, high = getattr(config, field.name)
            return f"{low:g} to {high:g}{units.get(quantity, '')}".replace("-", "\N{MINUS SIGN}")
    return "each axis" if name == "flip" else ""


def _draw_patch(axes: Axes, image: np.ndarray, label: np.ndarray, low: float, high: float) -> None:
    foreground = (label > 0) & (label != IGNORE_INDEX)
    if image.ndim == 3:
        areas = foreground.sum(axis=(1, 2))
        shown = int(areas.argmax()) if areas.any() else len(image) // 2
        image, foreground = image[shown], foreground[shown]
    # As radiologists see a slice: front up, the patient's right on the left; arrays run to the right and front.
    image, foreground = image[::-1, ::-1], foreground[::-1, ::-1]
    axes.imshow(image, cmap="gray", vmin=low, vmax=high)
    if foreground.any() and min(foreground.shape) > 1:
        axes.contour(foreground, levels=[0.5], colors=[_CONTOUR], linewidths=1.1)
    axes.set_axis_off()


def _name_row(axes: Axes, name: str, strength: str) -> None:
    place: dict[str, Any] = {"transform": axes.transAxes, "ha": "right"}
    axes.text(-0.08, 0.52, name, va="bottom", fontsize=10.5, fontweight="bold", color="0.1", **place)
    axes.text(-0.08, 0.48, strength, va="top", fontsize=8.5, color="0.4", **place)
