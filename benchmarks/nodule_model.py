"""How well the packaged model segments held-out nodules that somebody points at, by size and by offset of the click.

    python benchmarks/nodule_model.py LIDC_FOLDER [--fold 0] [--output benchmarks/results/nodule-model.md]

Every nodule of the fold's validation stacks is clicked at its centroid (the voxel of it that is nearest), and 2.5, 5,
7.5 and 10 mm beside that in a direction drawn at random, the same for all rows. The truth is what at least two readers
marked. The stacks are 128 pixels wide: the view of the network does not move with the click, the choice of nodule does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lungkit.data import read_volume
from lungkit.data.geometry import orient, plan_geometry
from lungkit.inference import Predictor, model_folder
from lungkit.metrics import label_lesions
from lungkit.metrics.comparison import bca_interval

OFFSETS_MM = (0.0, 2.5, 5.0, 7.5, 10.0)
SIZES_ML = (0.0, 0.1, 0.5, 2.0, math.inf)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--model", default="lidc-nodules")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--limit", type=int, help="only so many stacks, to try this program")
    options = parser.parse_args(arguments)
    folds = json.loads((options.data / "splits_final.json").read_text())
    cases = sorted(folds[options.fold]["val"])[: options.limit]
    text = _table(options.data, cases, options.model)
    print(text)  # noqa: T201
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


def _table(data: Path, cases: list[str], model: str) -> str:
    plain = Predictor.from_run(model_folder(model), device="cpu")
    mirrored = Predictor.from_run(model_folder(model), device="cpu", mirror=True)
    rows = {offset: [] for offset in OFFSETS_MM}
    with_tta, sizes, seconds = [], [], []
    for index, case in enumerate(cases):
        scan = read_volume(data / "imagesTr" / f"{case}_0000.nii.gz")
        geometry = plan_geometry(scan)
        truth = orient(read_volume(data / "labelsTr" / f"{case}.nii.gz").array, geometry) > 0
        numbered, count = label_lesions(truth)
        for lesion in range(1, count + 1):
            own = numbered == lesion
            voxels = np.argwhere(own)
            centre = voxels[np.linalg.norm(voxels - voxels.mean(0), axis=1).argmin()]
            angle = np.random.default_rng([index, lesion]).uniform(0, 2 * math.pi)
            sizes.append(len(voxels) * math.prod(geometry.spacing_mm) / 1000)
            for offset in OFFSETS_MM:
                click = (
                    centre + np.array([0, math.sin(angle), math.cos(angle)]) * offset / geometry.spacing_mm
                )
                click = np.clip(click, 0, np.array(truth.shape) - 1)
                started = time.perf_counter()
                rows[offset].append(_dice(plain, scan, click, own))
                seconds.append(time.perf_counter() - started)
            with_tta.append(_dice(mirrored, scan, centre, own))
    return _text(model, plain, len(cases), sizes, rows, with_tta, float(np.median(seconds)))


def _dice(predictor: Predictor, scan, click: np.ndarray, truth: np.ndarray) -> float:
    geometry = plan_geometry(scan)
    z, y, x = click
    marker = [
        (size - 1 - value) if flip else value
        for axis, flip, size in zip(geometry.axes, geometry.flips, geometry.original_shape, strict=True)
        for value in [(x, y, z)[axis]]
    ]
    point = tuple(float(value) for value in (scan.affine @ [*marker, 1.0])[:3])
    found = orient(predictor.segment_at(scan, [point], stability=False).mask, geometry) > 0
    return 2 * float((found & truth).sum()) / float(found.sum() + truth.sum())


def _text(model, predictor, cases, sizes, rows, with_tta, seconds) -> str:
    sizes_ml = np.array(sizes)

    def cell(values) -> str:
        values = np.asarray(values)
        if len(values) < 2:
            return "-"
        interval = bca_interval(values)
        mean = f"{values.mean():.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        return f"{mean} | {np.median(values):.3f} | {(values == 0).sum()}"

    digest = predictor.models[0].digest
    lines = [
        f"# Model {model}: Dice on held-out nodules",
        "",
        f"{len(sizes)} nodules of {cases} stacks; SHA-256 of the model's manifest {digest};",
        f"a click takes {seconds:.2f} s in the median ({predictor.device.type}, without those for stability).",
        "",
        "| nodules | number | mean Dice [95 % interval] | median | not found |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| all, at the centroid | {len(sizes)} | {cell(rows[0.0])} |",
        f"| the same with --tta | {len(sizes)} | {cell(with_tta)} |",
    ]
    for low, high in itertools.pairwise(SIZES_ML):
        chosen = (sizes_ml >= low) & (sizes_ml < high)
        name = f"{low:g} to {high:g} ml" if math.isfinite(high) else f"{low:g} ml and more"
        lines.append(f"| {name} | {chosen.sum()} | {cell(np.array(rows[0.0])[chosen])} |")
    lines += [
        f"| clicked {offset:g} mm off | {len(sizes)} | {cell(rows[offset])} |" for offset in OFFSETS_MM[1:]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
