"""The augmentation picture: which rows it has, and that it is a readable PNG."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lungkit.data.augment import AugmentConfig
from lungkit.data.preview import save_augmentation_preview
from lungkit.errors import UsageError


def patches(*shape: int, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(count, 1, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(count, *shape, dtype=torch.uint8)
    labels[..., 5:12, 8:14] = 1
    return images, labels


def picture(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("shape", [(24, 24), (6, 24, 24)])
def test_a_picture_with_contours_is_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = save_augmentation_preview(tmp_path / "preview.png", *patches(*shape), AugmentConfig(), samples=1)
    pixels = picture(path).astype(int)
    amber = (pixels[..., 0] > 220) & (abs(pixels[..., 1] - 176) < 25) & (pixels[..., 2] < 60)
    assert int(amber.sum()) > 200


def test_rows_are_the_transforms_that_are_on(tmp_path: Path) -> None:
    sizes = []
    flips = dataclasses.replace(AugmentConfig.none(), flip_probability=0.5)
    for config in (AugmentConfig.none(), flips):
        path = save_augmentation_preview(tmp_path / "preview.png", *patches(24, 24), config)
        sizes.append(picture(path).shape[0])
    assert sizes[1] - sizes[0] == pytest.approx(1.55 * 110, abs=2)


def test_samples_limits_the_columns(tmp_path: Path) -> None:
    images, labels = patches(24, 24, count=4)
    wide = save_augmentation_preview(tmp_path / "4.png", images, labels, AugmentConfig.none())
    narrow = save_augmentation_preview(tmp_path / "1.png", images, labels, AugmentConfig.none(), samples=1)
    assert picture(narrow).shape[1] < picture(wide).shape[1]


def test_the_same_seed_gives_the_same_picture(tmp_path: Path) -> None:
    config = dataclasses.replace(AugmentConfig.none(), rotation_probability=1.0)
    pictures = [
        picture(
            save_augmentation_preview(tmp_path / f"{i}.png", *patches(24, 24), config, seed=seed, samples=1)
        )
        for i, seed in enumerate((1, 1, 2))
    ]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_patches_without_foreground_are_shown(tmp_path: Path) -> None:
    images, labels = patches(4, 24, 24)
    path = save_augmentation_preview(
        tmp_path / "p.png", images, torch.zeros_like(labels), AugmentConfig.none()
    )
    assert path.is_file()


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
