"""A tiny dataset and configurations that train on it in a second."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lungkit.data import write_nifti, write_phantom_dataset
from lungkit.training import DataConfig, EngineConfig, ModelConfig, OptimiserConfig, TrainConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and other work on the machine would slow them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten phantom slices of 32 x 32."""
    return write_phantom_dataset(tmp_path_factory.mktemp("phantom"), cases=10, shape=(32, 32), dims=2)


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(phantom_root: Path, cache_root: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Factory of configurations: six epochs of two steps on the tiny phantom; keywords replace options."""

    def build(**options: Any) -> TrainConfig:
        config = TrainConfig(
            data=DataConfig(root=str(phantom_root), cache=str(cache_root), patch_size=(16, 16)),
            model=ModelConfig(name="attention-unet", features=(4, 8)),
            optimiser=OptimiserConfig(warmup_steps=3),
            engine=EngineConfig(accelerator="cpu", precision="fp32"),  # the same on every machine
            epochs=6,
            steps_per_epoch=2,
            batch_size=2,
            runs=str(tmp_path / "runs"),
            name="run",
        )
        for name, value in options.items():
            part, _, field = name.partition("__")
            config = replace(
                config, **{part: replace(getattr(config, part), **{field: value}) if field else value}
            )
        return config

    return build


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Factory of datasets of any kind in nnU-Net raw layout: noise at -800 HU, one ball 300 HU brighter for each class.

    Shapes and spacings are (Z, Y, X). Cases whose number is in ``empty`` have no foreground; with ``ignore`` the last
    rows of every slice are to be ignored; the first ``validation`` cases are fold 0's where that is given.
    """

    def build(
        *,
        cases: int = 4,
        shape: tuple[int, int, int] = (1, 32, 32),
        spacings_mm: tuple[tuple[float, float, float], ...] = ((1.0, 1.0, 1.0),),
        channels: int = 1,
        classes: int = 2,
        ignore: bool = False,
        empty: tuple[int, ...] = (),
        validation: int | None = None,
    ) -> Path:
        root = tmp_path / "dataset"
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir(parents=True)
        grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
        names = [f"case_{number}" for number in range(cases)]
        for number, name in enumerate(names):
            random = np.random.default_rng(number)
            z, y, x = spacings_mm[number % len(spacings_mm)]
            affine = np.diag([-x, -y, z, 1.0])
            label = np.zeros(shape, np.uint8)
            for index in range(1, 1 if number in empty else classes):
                centre = [random.integers(size // 4, size - size // 4) if size > 1 else 0 for size in shape]
                square = sum((axis - middle) ** 2 for axis, middle in zip(grid, centre, strict=True))
                label[square <= (shape[1] / 6) ** 2] = index
            image = (random.normal(-800, 40, (channels, *shape)) + 300.0 * label).round().astype(np.int16)
            if ignore:
                label[:, -4:] = classes
            for channel in range(channels):
                path = root / "imagesTr" / f"{name}_{channel:04d}.nii.gz"
                write_nifti(path, image[channel].transpose(2, 1, 0), affine)
            write_nifti(root / "labelsTr" / f"{name}.nii.gz", label.transpose(2, 1, 0), affine)
        labels = {"background": 0, **{f"tumour{index}": index for index in range(1, classes)}}
        content = {
            "channel_names": {
                str(channel): "CT" if channel == 0 else f"CT{channel}" for channel in range(channels)
            },
            "labels": labels | ({"ignore": classes} if ignore else {}),
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        (root / "dataset.json").write_text(json.dumps(content))
        if validation is not None:
            folds = [{"train": names[validation:], "val": names[:validation]}]
            (root / "splits_final.json").write_text(json.dumps(folds))
        return root

    return build
