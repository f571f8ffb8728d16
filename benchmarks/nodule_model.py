"""How well the packaged model segments held-out nodules that somebody points at, by size and by offset of the click.

    python benchmarks/nodule_model.py LIDC_FOLDER --folds WORK_FOLDER/runs [--output benchmarks/results/nodule-model.md]

With ``--folds`` every nodule is segmented by the run that was trained without its patient (fold-0, fold-1 ... of
benchmarks/train_nodule_model.py); with ``--fold K`` those of one fold by ``--model``.

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
    parser.add_argument("--folds", type=Path, help="folder of the runs fold-0, fold-1 ...")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--limit", type=int, help="only so many stacks, to try this program")
    options = parser.parse_args(arguments)
    folds = json.loads((options.data / "splits_final.json").read_text())
    models = {options.fold: options.model}
    if options.folds is not None:
        models = {fold: str(options.folds / f"fold-{fold}") for fold in range(len(folds))}
    parts = [(model, sorted(folds[fold]["val"])[: options.limit]) for fold, model in models.items()]
    text = _table(options.data, parts, options.device)
    print(text)  # noqa: T201
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


def _table(data: Path, parts: list[tuple[str, list[str]]], device: str) -> str:
    rows: dict[float, list[float]] = {offset: [] for offset in OFFSETS_MM}
    with_tta: list[float] = []
    sizes: list[float] = []
    seconds: list[float] = []
    for model, cases in parts:
        plain = Predictor.from_run(model_folder(model), device=device)
        mirrored = Predictor.from_run(model_folder(model), device=device, mirror=True)
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
                    aside = np.array([0, math.sin(angle), math.cos(angle)]) * offset / geometry.spacing_mm
                    click = np.clip(centre + aside, 0, np.array(truth.shape) - 1)
                    started = time.perf_counter()
                    rows[offset].append(_dice(plain, scan, click, own))
                    seconds.append(time.perf_counter() - started)
                with_tta.append(_dice(mirrored, scan, centre, own))
    digests = ", ".join(Predictor.from_run(model_folder(model)).models[0].digest for model, _ in parts)
    count = sum(len(cases) for _, cases in parts)
    return _text(digests, device, count, sizes, rows, with_tta, float(np.median(seconds)))


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


def _text(digests, device, cases, sizes, rows, with_tta, seconds) -> str:
    sizes_ml = np.array(sizes)

    def cell(values) -> str:
        values = np.asarray(values)
        if len(values) < 2:
            return "-"
        interval = bca_interval(values)
        mean = f"{values.mean():.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        return f"{mean} | {np.median(values):.3f} | {(values == 0).sum()}"

    lines = [
        "# The model of nodules: Dice on held-out nodules",
        "",
        f"{len(sizes)} nodules of {cases} stacks; SHA-256 of the manifest of each model: {digests};",
        f"a click takes {seconds:.2f} s in the median ({device}, without those for stability).",
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
