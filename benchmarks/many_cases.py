"""Start-up, memory and restart of a run on thousands of cases: ``python benchmarks/many_cases.py FOLDER 1000 10000``.

The cases are tiny (4 x 16 x 16 voxels, a ball in noise), so that what is measured is what every case costs beside its
voxels: finding, reading, fingerprint, cache, table of patches. Each size runs in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lungkit.data import PatchSampler, write_nifti
from lungkit.training import DataConfig, EngineConfig, ModelConfig, TrainConfig
from lungkit.training.planning import prepare, prepare_cases

_PATCHES = 4000


def write_dataset(root: Path, cases: int) -> None:
    """A dataset in nnU-Net layout, or what is there already."""
    if (root / "dataset.json").exists():
        return
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True, exist_ok=True)
    grid = np.indices((16, 16, 4)) - np.array([8, 8, 2]).reshape(3, 1, 1, 1)
    ball = (grid**2).sum(axis=0) < 9
    affine = np.diag([-0.7, -0.7, 2.0, 1.0])
    random = np.random.default_rng(0)
    for number in range(cases):
        image = (random.normal(-800, 40, ball.shape) + 700.0 * ball).astype(np.int16)
        write_nifti(root / "imagesTr" / f"case_{number:05d}_0000.nii.gz", image, affine)
        write_nifti(root / "labelsTr" / f"case_{number:05d}.nii.gz", ball.astype(np.uint8), affine)
    labels = {"background": 0, "tumour": 1}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(content))


def measure(root: Path) -> dict[str, float]:
    """Seconds of reading, preprocessing and patches; peak memory in MB; files and maps open at the end."""
    config = TrainConfig(
        data=DataConfig(
            root=str(root), cache=str(root / "cache"), dims=2, patch_size=(8, 8), context_slices=0
        ),
        model=ModelConfig(name="unet", features=(4, 8)),
        engine=EngineConfig(accelerator="cpu"),
    )
    moments = [time.perf_counter()]
    prepared = prepare(config)
    moments.append(time.perf_counter())
    train, _ = prepare_cases(prepared, config)
    moments.append(time.perf_counter())
    sampler = PatchSampler(train, prepared.plan.patch_size, seed=0)
    for first in range(0, _PATCHES, 8):
        sampler.batch(range(first, first + 8))
    moments.append(time.perf_counter())
    own = Path("/proc/self")
    return {
        **dict(zip(("reading", "preprocessing", "patches"), np.diff(moments).tolist(), strict=True)),
        "memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "open files": float(len([*(own / "fd").iterdir()])),
        "maps of the cache": float((own / "maps").read_text().count(str(root))),
    }


def main() -> None:
    """Print a table: a row for the first start on each number of cases, and one for a start with the cache."""
    if sys.argv[1] == "--measure":
        sys.stdout.write(json.dumps(measure(Path(sys.argv[2]))))
        return
    folder = Path(sys.argv[1])
    rows = []
    for cases in map(int, sys.argv[2:]):
        write_dataset(folder / str(cases), cases)
        for start in ("first", "again"):
            command = [sys.executable, __file__, "--measure", str(folder / str(cases))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"cases": cases, "start": start, **json.loads(done.stdout)})
    sys.stdout.write("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]) + "\n")
    for row in rows:
        shown = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()]
        sys.stdout.write("| " + " | ".join(shown) + " |\n")


if __name__ == "__main__":
    main()
