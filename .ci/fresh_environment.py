"""What a new user does first, in an environment that has the wheel and no compiler: a nodule is pointed at."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lungkit.data import read_volume, write_nifti

TOOLS = ("cc", "c++", "gcc", "g++", "clang", "nvcc", "cmake", "ninja", "make")

found = [tool for tool in TOOLS if shutil.which(tool)]
assert not found, f"not without a compiler: {found}"
commands = Path(sys.executable).parent
info = json.loads(subprocess.check_output([commands / "lungkit-info", "--json"]))
assert info["libraries"]["cpu"] == info["libraries"]["geometry"] == "loaded", info["libraries"]
assert all(backends["cpu"]["native"] for backends in info["ops"].values()), info["ops"]

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    z, y, x = np.indices((24, 160, 180))
    scan = np.random.default_rng(0).normal(-800, 20, z.shape)
    ball = (z - 12) ** 2 + (y - 80) ** 2 + (x - 90) ** 2 <= 81
    scan[ball] += 850
    affine = np.diag([-0.7, -0.7, 2.0, 1.0])
    write_nifti(folder / "ct.nii.gz", scan.transpose(2, 1, 0).astype(np.int16), affine)
    arguments = [
        "-i",
        folder / "ct.nii.gz",
        "-o",
        folder / "nodule.nii.gz",
        "--at",
        "63,56,24",
        "--no-report",
    ]
    subprocess.run([commands / "lungkit-predict", *arguments], check=True)
    mask = np.asarray(read_volume(folder / "nodule.nii.gz").array).transpose(2, 1, 0) > 0
overlap = 2 * (mask & ball).sum() / (mask.sum() + ball.sum())
assert overlap > 0.7, f"the ball is found with a Dice of {overlap:.2f} only"
sys.stdout.write(f"a ball is pointed at and found with a Dice of {overlap:.2f}\n")
