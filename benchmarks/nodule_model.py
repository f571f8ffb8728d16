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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

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
    parser.add_argument("--processes", type=int, default=1, help="folds at a time")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--limit", type=int, help="only so many stacks, to try this program")
    options = parser.parse_args(arguments)
    folds = json.loads((options.data / "splits_final.json").read_text())
    models = {options.fold: options.model}
    if options.folds is not None:
        models = {fold: str(options.folds / f"fold-{fold}") for fold in range(len(folds))}
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        parts = [
            pool.submit(
                measure, options.data, model, sorted(folds[fold]["val"])[: options.limit], options.device
            )
            for fold, model in models.items()
        ]
        text = table([part.result() for part in parts], options.device)
    print(text)  # noqa: T201
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


@dataclass
class Measured:
    """Of each nodule its size in ml, its Dice by offset of the click and with mirror images; seconds a click."""

    digest: str
    stacks: int
    sizes: list[float] = field(default_factory=list)
    dice: dict[float, list[float]] = field(default_factory=lambda: {offset: [] for offset in OFFSETS_MM})
    with_tta: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def measure(data: Path, model: str, cases: Sequence[str], device: str) -> Measured:
    """Click at every nodule of the stacks ``cases`` with one model, on one thread."""
    torch.set_num_threads(1)
    plain = Predictor.from_run(model_folder(model), device=device)
    mirrored = Predictor.from_run(model_folder(model), device=device, mirror=True)
    found = Measured(plain.models[0].digest, len(cases))
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
            found.sizes.append(len(voxels) * math.prod(geometry.spacing_mm) / 1000)
            for offset in OFFSETS_MM:
                aside = np.array([0, math.sin(angle), math.cos(angle)]) * offset / geometry.spacing_mm
                click = np.clip(centre + aside, 0, np.array(truth.shape) - 1)
                started = time.perf_counter()
                found.dice[offset].append(_dice(plain, scan, click, own))
                found.seconds.append(time.perf_counter() - started)
            found.with_tta.append(_dice(mirrored, scan, centre, own))
    return found


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


def table(parts: Sequence[Measured], device: str) -> str:
    """The figures of all folds together, as Markdown."""
    sizes_ml = np.array([size for part in parts for size in part.sizes])
    with_tta = [dice for part in parts for dice in part.with_tta]
    rows = {offset: [dice for part in parts for dice in part.dice[offset]] for offset in OFFSETS_MM}
    seconds = float(np.median([second for part in parts for second in part.seconds]))
    digests = ", ".join(part.digest for part in parts)

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
        f"{len(sizes_ml)} nodules of {sum(part.stacks for part in parts)} stacks;",
        f"SHA-256 of the manifest of each model: {digests};",
        f"a click takes {seconds:.2f} s in the median ({device}, without those for stability).",
        "",
        "| nodules | number | mean Dice [95 % interval] | median | not found |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| all, at the centroid | {len(sizes_ml)} | {cell(rows[0.0])} |",
        f"| the same with --tta | {len(sizes_ml)} | {cell(with_tta)} |",
    ]
    for low, high in itertools.pairwise(SIZES_ML):
        chosen = (sizes_ml >= low) & (sizes_ml < high)
        name = f"{low:g} to {high:g} ml" if math.isfinite(high) else f"{low:g} ml and more"
        lines.append(f"| {name} | {chosen.sum()} | {cell(np.array(rows[0.0])[chosen])} |")
    lines += [
        f"| clicked {offset:g} mm off | {len(sizes_ml)} | {cell(rows[offset])} |" for offset in OFFSETS_MM[1:]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
