"""The augmentation picture: which rows and columns it has, what is outlined where, and bad arguments."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pictures import edge_of, image_of, outlines, pixels, shows

from lungkit.data.augment import AugmentConfig
from lungkit.data.preview import save_augmentation_preview
from lungkit.errors import UsageError


def patches(*shape: int, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(count, 1, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(count, *shape, dtype=torch.uint8)
    labels[..., 5:12, 8:14] = 1
    return images, labels


AMBER = "#ffb000"
# Rows 5 to 11 of 24 and columns 8 to 13 as they are seen: front up, the patient's right on the left.
SEEN = ((11.5, 18.5), (9.5, 15.5))


def row_names(figure: Figure) -> list[str]:
    """What stands left of the first column, in bold."""
    return [text.get_text() for ax in figure.axes for text in ax.texts if text.get_fontweight() == "bold"]


@pytest.mark.parametrize("shape", [(24, 24), (6, 24, 24)])
def test_the_foreground_is_outlined_where_it_lies(
    tmp_path: Path, figures: list[Figure], shape: tuple[int, ...]
) -> None:
    images, labels = patches(*shape)
    path = save_augmentation_preview(tmp_path / "preview.png", images, labels, AugmentConfig(), samples=1)
    original = figures[0].axes[0]
    (outline,) = outlines(original)
    assert outline[:2] == (AMBER, False)
    assert outline.rows == pytest.approx(SEEN[0]) and outline.columns == pytest.approx(SEEN[1])
    assert shows(path, original, 15.0, SEEN[1][0], AMBER)
    shown = images[0, 0] if len(shape) == 2 else images[0, 0, 0]
    assert np.array_equal(image_of(original), shown.flip(0, 1).numpy())


def test_a_transform_moves_image_and_outline_together(tmp_path: Path, figures: list[Figure]) -> None:
    images, labels = patches(24, 24, count=1)
    images = labels[:, None].float()
    config = dataclasses.replace(AugmentConfig.none(), rotation_probability=1.0)
    save_augmentation_preview(tmp_path / "preview.png", images, labels, config)
    rotated = figures[0].axes[1]
    (outline,) = outlines(rotated)
    assert (outline.rows, outline.columns) != SEEN
    rows, columns = edge_of(image_of(rotated) > 0.5)
    assert outline.rows == pytest.approx(rows, abs=1.0) and outline.columns == pytest.approx(columns, abs=1.0)


def test_rows_are_the_transforms_that_are_on(tmp_path: Path, figures: list[Figure]) -> None:
    flips = dataclasses.replace(AugmentConfig.none(), flip_probability=0.5)
    heights = [
        pixels(save_augmentation_preview(tmp_path / "preview.png", *patches(24, 24), config)).shape[0]
        for config in (AugmentConfig.none(), flips)
    ]
    assert [row_names(figure) for figure in figures] == [["original", "all"], ["original", "flip", "all"]]
    assert heights[1] - heights[0] == pytest.approx(1.55 * 110, abs=2)


def test_samples_limits_the_columns(tmp_path: Path, figures: list[Figure]) -> None:
    images, labels = patches(24, 24, count=4)
    wide = save_augmentation_preview(tmp_path / "4.png", images, labels, AugmentConfig.none())
    narrow = save_augmentation_preview(tmp_path / "1.png", images, labels, AugmentConfig.none(), samples=1)
    titles = [[ax.get_title() for ax in figure.axes if ax.get_title()] for figure in figures]
    assert titles == [["patch 1", "patch 2", "patch 3", "patch 4"], ["patch 1"]]
    assert pixels(narrow).shape[1] < pixels(wide).shape[1]


def test_the_same_seed_gives_the_same_pixels(tmp_path: Path) -> None:
    config = dataclasses.replace(AugmentConfig.none(), rotation_probability=1.0)
    pictures = [
        pixels(
            save_augmentation_preview(tmp_path / f"{i}.png", *patches(24, 24), config, seed=seed, samples=1)
        )
        for i, seed in enumerate((1, 1, 2))
    ]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_patches_without_foreground_are_shown_and_not_outlined(tmp_path: Path, figures: list[Figure]) -> None:
    images, labels = patches(5, 24, 24)
    save_augmentation_preview(tmp_path / "p.png", images, torch.zeros_like(labels), AugmentConfig.none())
    assert [outlines(ax) for ax in figures[0].axes] == [[]] * 4
    assert np.array_equal(image_of(figures[0].axes[0]), images[0, 0, 2].flip(0, 1).numpy())  # the middle


def test_global_pyplot_state_is_left_alone(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    save_augmentation_preview(tmp_path / "preview.png", *patches(24, 24), AugmentConfig.none())
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_the_tensors_are_not_changed(tmp_path: Path) -> None:
    images, labels = patches(24, 24)
    copies = images.clone(), labels.clone()
    save_augmentation_preview(tmp_path / "preview.png", images, labels, AugmentConfig(), samples=1)
    assert torch.equal(images, copies[0])
    assert torch.equal(labels, copies[1])


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"preview\.jpg does not end with \.png"):
        save_augmentation_preview(tmp_path / "preview.jpg", *patches(24, 24), AugmentConfig())


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_to_show_is_refused(tmp_path: Path, count: int) -> None:
    images, labels = patches(24, 24)
    with pytest.raises(UsageError, match="samples"):
        save_augmentation_preview(
            tmp_path / "p.png", images[:count], labels[:count], AugmentConfig(), samples=0 if count else 3
        )


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        save_augmentation_preview(tmp_path / "nowhere" / "p.png", *patches(24, 24), AugmentConfig.none())
