"""Well-known tools' own networks on the nodule stacks, for as many minutes as lungkit-train, measured in the same way.

    python benchmarks/nodule_peers.py DATA --peer monai-unet --minutes 20 -o WORK/monai-unet
    python benchmarks/nodule_peers.py DATA --peer monai-attention-unet --minutes 20 -o WORK/monai-attention-unet
    python benchmarks/nodule_peers.py DATA --peer nnunet --nnunet-python VENV/bin/python --minutes 20 -o WORK/nnunet
    python benchmarks/nodule_peers.py DATA --peer lungkit --run RUN -o WORK/lungkit  # of --max_minutes 20
    python benchmarks/nodule_peers.py --table WORK/*/run.json

DATA is a dataset in nnU-Net raw layout with its folds; of the fold (``--fold``) the training cases train and the
validation cases are measured, nothing is chosen on them: the weights are those at the end. The output folder gets
``masks`` of the held-out cases, which ``lungkit-evaluate`` takes as well, and ``run.json``.

The stacks have the nodule in the middle, which a network can learn where its training patches lie alike. So every
held-out stack is measured again as a window of ``--window`` pixels, cut from it at random but the same for all tools.

Minutes are those of training steps with their waiting for data. Reading and preprocessing before, and the validations
of the curve, do not count; of a lungkit run, whose ``max_minutes`` hold its validations too, the curve leaves them out
as well, so that it trains for less than the others. All schedules end with the minutes.

MONAI's networks (monai_peer.py) get a slice with its two neighbours (lungkit's default has six), its own transforms,
loss and sliding window, and widths of (16, 32, 64, 128, 256). nnU-Net (nnunet_peer.py) goes by its own 2D plan, which
is made for a GPU of 8 GB: ``--batch_size`` replaces that of the plan, with which a CPU takes a minute for a few steps.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai_peer import train_monai
from nnunet_peer import train_nnunet

from lungkit.data import read_volume, write_nifti
from lungkit.errors import DataError, UsageError
from lungkit.inference import Predictor
from lungkit.metrics import CaseTable, MetricGroup, MetricOptions, bca_interval
from lungkit.report.evaluation import evaluate_pairs, find_label_scheme
from lungkit.training.config_io import load_config

Predict = Callable[[Path, Path], None]
"""Predict the held-out cases of a dataset into a folder of masks."""

PEERS = ("monai-unet", "monai-attention-unet", "nnunet", "lungkit")
METRICS = ("dice", "iou", "lesion_f1", "hd95_directed_mm")
TARGETS = (0.70, 0.75)
RESULTS = Path(__file__).parent / "results" / "nodule-peers.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure a peer, or write the table."""
    options = _parser().parse_args(arguments)
    if options.table:
        text = table([json.loads(path.read_text(encoding="utf-8")) for path in options.table])
        options.results.write_text(text, encoding="utf-8")
        sys.stdout.write(text)
        return 0
    if options.data is None or options.peer is None or options.output is None:
        raise SystemExit("give DATA, --peer and -o FOLDER, or --table RUN.json ...")
    split = json.loads((options.data / "splits_final.json").read_text(encoding="utf-8"))[options.fold]
    masks = options.output / "masks"
    masks.mkdir(parents=True)
    val = sorted(split["val"])
    overlap = MetricOptions(groups=(MetricGroup.OVERLAP,))

    def dice_of(folder: Path) -> float:
        return measure(folder, options.data, val, overlap).mean("dice")

    predict: Predict | None = None
    if options.peer == "lungkit":
        found, predict = read_lungkit(options, val)
        predict(options.data, masks)
    elif options.peer == "nnunet":
        found = train_nnunet(options, val, masks, dice_of)
    else:
        found, predict = train_monai(options, split["train"], val, masks, dice_of)
    end = measure(masks, options.data, val, MetricOptions())
    if predict is not None:
        windows = cut_windows(options.data, val, options.window, options.output / "windows")
        predict(windows, windows / "masks")
        found["dice_in_windows"] = _number(measure(windows / "masks", windows, val, overlap).mean("dice"))
    record = {
        "peer": options.peer,
        "fold": options.fold,
        "seed": None if options.peer == "nnunet" else options.seed,
        "minutes": options.minutes,
        "threads": torch.get_num_threads(),
        "machine": _machine(),
        **found,
        "end": {name: _number(end.mean(name)) for name in METRICS},
        "cases": {
            row.case_id: {name: _number(row.values[name]) for name in METRICS}
            for row in end.of_label(end.labels[0])
        },
    }
    (options.output / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table([record]))
    return 0


def measure(masks: Path, data: Path, cases: Sequence[str], options: MetricOptions) -> CaseTable:
    """Metrics of predicted masks, as lungkit-evaluate gives them."""
    pairs = {case: (masks / f"{case}.nii.gz", data / "labelsTr" / f"{case}.nii.gz") for case in cases}
    evaluation = evaluate_pairs(pairs, find_label_scheme(data), options=options)
    if evaluation.failed:
        raise DataError(next(iter(evaluation.failed.values())))
    return evaluation.table


def cut_windows(data: Path, cases: Sequence[str], size: int, folder: Path) -> Path:
    """A dataset of the cases, each cut to ``size`` x ``size`` pixels at a position drawn from all, always the same."""
    for name in ("imagesTr", "labelsTr", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_bytes((data / "dataset.json").read_bytes())
    random = np.random.default_rng(0)
    for case in sorted(cases):
        names = f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"
        volumes = [read_volume(data / name) for name in names]
        x, y = (int(random.integers(max(0, length - size) + 1)) for length in volumes[0].array.shape[:2])
        for name, volume in zip(names, volumes, strict=True):
            write_nifti(folder / name, volume.array[x : x + size, y : y + size], volume.affine)
    return folder


def read_lungkit(options: argparse.Namespace, val: Sequence[str]) -> tuple[dict[str, Any], Predict]:
    """The curve of a finished run, and what its last weights predict, without postprocessing.

    Its best weights and its postprocessing were chosen on the held-out cases, and are left alone therefore.
    """
    if options.run is None:
        raise UsageError("--peer lungkit needs --run, the folder of a finished run of lungkit-train")
    config = load_config(options.run / "config.yaml")
    if config.max_minutes is None:
        raise UsageError(f"{options.run} was not given minutes; train with --max_minutes")
    held_out = json.loads((options.run / "dataset.json").read_text(encoding="utf-8"))["split"]["val"]
    if sorted(held_out) != list(val):
        raise DataError(f"{options.run}: validated on other cases than fold {options.fold} of {options.data}")
    rows = [
        json.loads(line) for line in (options.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    seconds, curve = 0.0, []
    for row in rows:
        seconds += row["seconds_waiting_for_data"] + row["seconds_computing"]
        if row.get("val_dice") is not None:
            curve.append((round(seconds, 2), row["val_dice"]))
    predictor = Predictor.from_run(options.run / "checkpoints" / "last", device="cpu")

    def predict(data: Path, masks: Path) -> None:
        for case in val:
            predictor(data / "imagesTr" / f"{case}_0000.nii.gz").save(masks / f"{case}.nii.gz")

    environment = json.loads((options.run / "env.json").read_text(encoding="utf-8"))
    found = {
        "tool": "lungkit",
        "network": f"{config.model.name}, {config.data.dims}D, {config.engine.precision}",
        "versions": {name: environment["versions"][name] for name in ("lungkit", "torch")},
        "threads": environment["threads"],
        "minutes": config.max_minutes,
        "seed": config.seed,
        "parameters": sum(parameter.numel() for parameter in predictor.models[0].network.parameters()),
        "patch_size": list(config.data.patch_size or ()),
        "batch_size": config.batch_size,
        "steps": rows[-1]["step"],
        "seconds": round(seconds, 2),
        "seconds_per_step": seconds / rows[-1]["step"],
        "curve": curve,
        "note": "the curve is that of its own validations, on the grid of training",
    }
    return found, predict


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown of finished runs."""

    def told(key: str) -> str:
        return " and ".join(
            sorted({f"{record[key]:g}" if key != "machine" else record[key] for record in records})
        )

    versions = {f"{record['tool']}: {_listed(record['versions'])}" for record in records}
    cases = {len(record["cases"]) for record in records}
    lines = [
        "# Well-known tools on the nodule stacks, given the same minutes",
        "",
        f"Machine: {told('machine')}, {told('threads')} threads. Budget: {told('minutes')} minutes of training each.",
        f"Versions: {'; '.join(sorted(versions))}.",
        f"Cases: {' and '.join(map(str, sorted(cases)))} held-out stacks of fold {told('fold')}, on which no run chose",
        "anything: the weights are those at the end of the budget, without postprocessing. Fold 0 had a say in",
        "lungkit's defaults. All masks are measured by lungkit's metrics; the interval is BCa over patients.",
        "",
        "Minutes are those of training steps and their waiting for data, without preprocessing before and validations",
        "on the way; lungkit's budget holds its validations, so that it trains for less. The minutes to a mean Dice",
        "are those of the first validation that has it. HD95 leaves out cases without a mask, whose number follows it.",
        "The stacks have their nodule in the middle; `in windows` is the Dice of windows cut from them at random.",
        "",
        "| tool | network | seed | parameters | steps of batch | minutes trained | Dice [95 % interval] | IoU "
        "| lesion F1 | HD95 mm (without) | in windows | "
        + " | ".join(f"minutes to {target:.2f}" for target in TARGETS)
        + " |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | "
        + " | ".join("---:" for _ in TARGETS)
        + " |",
    ]
    for record in records:
        values = {name: [case[name] for case in record["cases"].values()] for name in METRICS}
        interval = bca_interval(values["dice"], clusters=[case.split("_n")[0] for case in record["cases"]])
        end, missing = record["end"], values["hd95_directed_mm"].count(None)
        distance = "-" if end["hd95_directed_mm"] is None else f"{end['hd95_directed_mm']:.2f}"
        cells = [
            record["tool"],
            record["network"],
            "-" if record["seed"] is None else str(record["seed"]),
            f"{record['parameters'] / 1e6:.2f} M",
            f"{record['steps']} x {record['batch_size']}",
            f"{record['seconds'] / 60:.1f}",
            f"{end['dice']:.3f} [{interval.low:.3f}, {interval.high:.3f}]",
            f"{end['iou']:.3f}",
            f"{end['lesion_f1']:.3f}",
            f"{distance} ({missing})",
            "-" if record.get("dice_in_windows") is None else f"{record['dice_in_windows']:.3f}",
            *(_minutes_to(record["curve"], target) for target in TARGETS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = sorted({f"{record['tool']}: {record['note']}" for record in records if "note" in record})
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _minutes_to(curve: Sequence[Sequence[float]], target: float) -> str:
    return next((f"{seconds / 60:.1f}" for seconds, dice in curve if dice >= target), "not reached")


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _machine() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA")
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument("-o", "--output", type=Path, help="new folder")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--window", type=int, default=96, help="pixels, of the cases that are cut again")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training")
    parser.add_argument("--checkpoints", type=int, default=10, help="points of the curve")
    parser.add_argument("--batch_size", type=int, help="default: 16, of nnU-Net its plan's")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of MONAI's networks, with AdamW")
    parser.add_argument("--workers", type=int, default=1, help="processes that augment")
    parser.add_argument("--bf16", action="store_true", help="MONAI's networks under autocast")
    parser.add_argument("--seed", type=int, default=0, help="of MONAI's networks")
    parser.add_argument("--run", type=Path, help="of lungkit-train, for --peer lungkit")
    parser.add_argument("--nnunet-python", type=Path, help="of the environment with nnunetv2")
    parser.add_argument(
        "--nnunet-folder", type=Path, help="what it preprocessed, made where absent (default: in the output)"
    )
    parser.add_argument(
        "--no-mirroring",
        action="store_true",
        help="nnU-Net's masks at the end without it, in a quarter of the time",
    )
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="RUN.json", help="write the table of these runs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
