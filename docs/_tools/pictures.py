"""Make the pictures of the pages, from the built-in phantom: ``python docs/_tools/pictures.py``, some minutes."""

from __future__ import annotations

import os
import runpy
import tempfile
from pathlib import Path

import numpy as np

from lungkit import Predictor
from lungkit.data import Volume, make_phantom
from lungkit.report import save_overlays
from lungkit.training import DataConfig, ModelConfig, TrainConfig, Trainer

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
SEED = 2031
"""Of the phantom that is shown; those of training are others."""


def front_picture(path: Path) -> None:
    """Scan, truth, prediction and attention map of a slice that the network has not seen."""
    config = TrainConfig(data=DataConfig(phantom_cases=250), model=ModelConfig(name="attention-unet"))
    predictor = Predictor.from_run(Trainer(config).fit().run_folder)
    phantom = make_phantom(SEED, shape=(1, 128, 128), kinds=("solid",))
    volume = Volume(np.ascontiguousarray(phantom.image.transpose(2, 1, 0)), phantom.affine)
    prediction = predictor(volume, attention=True)

    def as_ras(array: np.ndarray) -> np.ndarray:
        """(Z, Y, X) in RAS, from (X, Y, Z) in the phantom's axes, where x and y run the other way."""
        return np.ascontiguousarray(array.transpose(2, 1, 0)[:, ::-1, ::-1])

    assert prediction.attention is not None
    save_overlays(
        path,
        as_ras(volume.array),
        as_ras(phantom.label.transpose(2, 1, 0)),
        {"prediction": as_ras(prediction.mask)},
        {"prediction": as_ras(prediction.attention)[0]},
        spacing_mm=phantom.spacing_mm,
        window=(-1000.0, 400.0),
    )


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        front_picture(PICTURES / "front.png")
        for example in ("training_loop", "own_network"):
            runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
            Path(f"{example}.png").rename(PICTURES / f"{example}.png")


if __name__ == "__main__":
    main()
