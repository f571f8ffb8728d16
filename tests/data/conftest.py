"""Small synthetic scans and datasets for the tests of lungkit.data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lungkit.data import write_nifti

AFFINE = np.diag([-0.75, -0.75, 2.5, 1.0])


def make_scan(seed: int, shape: tuple[int, int, int] = (12, 10, 6)) -> tuple[np.ndarray, np.ndarray]:
    """Image (int16, HU-like) and mask (uint8, one box of tumour) as (X, Y, Z)."""
    random = np.random.default_rng(seed)
    image = random.integers(-1000, -600, shape).astype(np.int16)
    mask = np.zeros(shape, np.uint8)
    mask[3:7, 2:6, 1:4] = 1
    image[mask == 1] = random.integers(-50, 100, int(mask.sum()))
    return image, mask


@pytest.fixture
def nnunet_folder(tmp_path: Path) -> Callable[..., Path]:
    """Factory of a small dataset in nnU-Net raw layout; keywords replace entries of dataset.json."""

    def build(names: tuple[str, ...] = ("case_a", "case_b"), *, channels: int = 1, **entries: Any) -> Path:
        root = tmp_path / "dataset"
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir(parents=True)
        for seed, name in enumerate(names):
            image, mask = make_scan(seed)
            for channel in range(channels):
                write_nifti(root / "imagesTr" / f"{name}_{channel:04d}.nii.gz", image, AFFINE)
            write_nifti(root / "labelsTr" / f"{name}.nii.gz", mask, AFFINE)
        content: dict[str, Any] = {
            "channel_names": {str(channel): f"CT{channel}" for channel in range(channels)},
            "labels": {"background": 0, "tumour": 1},
            "numTraining": len(names),
            "file_ending": ".nii.gz",
        }
        content |= entries
        (root / "dataset.json").write_text(json.dumps(content))
        return root

    return build
