"""``lungkit-predict --at``: the nodules that somebody pointed at."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lungkit.errors import DataError, UsageError, shorten

if TYPE_CHECKING:
    from lungkit.inference import Box, Predictor
    from lungkit.pipeline import OutputFiles, ScanInput

_LOG = logging.getLogger("lungkit")

_DEFAULT_MODEL = "lidc-nodules"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that point at nodules."""
    group = parser.add_argument_group(
        "pointing at nodules", "one scan; the model of the package where no --model is named"
    )
    add = group.add_argument
    add(
        "--at",
        action="append",
        default=[],
        metavar="X,Y,Z",
        help="segment the nodule at this point (mm); again for more",
    )
    add("--points", type=Path, metavar="FILE", help="points in a CSV file with columns x, y and z (mm)")
    add(
        "--box",
        action="append",
        default=[],
        metavar="X1,Y1,Z1,X2,Y2,Z2",
        help="the nodule in the middle of this box (two opposite corners, mm), cut off at its walls",
    )
    add(
        "--coordinates",
        choices=("lps", "ras"),
        default="lps",
        help="of the points: lps as in DICOM (default), or ras as in NIfTI; 3D Slicer shows ras",
    )
    add(
        "--solid-above",
        type=float,
        metavar="HU",
        help="voxels of at least this count as solid (default: -300)",
    )
    add(
        "--no-stability",
        dest="stability",
        action="store_false",
        help="do not repeat clicks beside each point",
    )


def is_pointing(options: argparse.Namespace) -> bool:
    """Whether a point was named."""
    return bool(options.at or options.box or options.points)


def default_model() -> Path:
    """Folder of the model that points are segmented with where none is named, whatever the current folder holds."""
    from lungkit.inference import known_models

    return known_models()[_DEFAULT_MODEL].folder


def with_signs(arguments: Sequence[str]) -> list[str]:
    """The arguments with "--at -1,2,3" as "--at=-1,2,3", which argparse would take for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--at", "--box") and argument.startswith("-") and "," in argument:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def segment_points(
    options: argparse.Namespace, predictor: Predictor, scans: Sequence[ScanInput], files: OutputFiles
) -> int:
    """Segment, measure, write and print; the exit code says whether there was a nodule at every point."""
    from lungkit._atomic import make_folder
    from lungkit.data import NanPolicy
    from lungkit.pipeline import write_results
    from lungkit.pipeline.pointed import SOLID_ABOVE_HU, measure_points, write_points

    for name in ("probabilities", "attention", "shard"):
        if getattr(options, name):
            raise UsageError(
                f"--{name} does not go with --at, --box and --points: they give the mask of one scan alone"
            )
    if len(scans) > 1:
        raise UsageError(
            f"{options.input} holds {len(scans)} scans; --at, --box and --points speak of one: name its file, or "
            "--series"
        )
    points = _points(options)
    scan = scans[0].load(max_voxels=predictor.max_voxels, nan_policy=NanPolicy(options.nan))
    table = files.table(scans[0].name)
    there = [path for path in (*files.of(scans[0].name), table) if path.exists()]
    if there and not options.overwrite:
        raise UsageError(f"{shorten(there)} exists; name another --output, or replace it with --overwrite")
    prediction = predictor.segment_at(scan.volumes[0], points, stability=options.stability)
    solid_above = SOLID_ABOVE_HU if options.solid_above is None else options.solid_above
    rows = measure_points(prediction, scan.volumes[0], solid_above=solid_above)
    for warning in prediction.warnings:
        _LOG.warning("warning: %s", warning)
    if any(row["found"] for row in rows):
        write_results(files, scans[0], scan, prediction, predictor)
        make_folder(table.parent)
        write_points(table, rows)
    lines = [json.dumps(rows, indent=2)] if options.json else [_line(row) for row in rows]
    sys.stdout.write("\n".join(lines) + "\n")
    missing = [row for row in rows if not row["found"]]
    if len(missing) == len(rows):
        _LOG.error("error: no nodule at any point; nothing was written")
    else:
        _LOG.info("%d of %d nodules; results in %s", len(rows) - len(missing), len(rows), files.path)
    return DataError.exit_code if missing else 0


def _points(options: argparse.Namespace) -> list[tuple[float, float, float] | Box]:
    from lungkit.pipeline.pointed import parse_box, parse_point, read_points

    return [
        *(parse_point(text, options.coordinates) for text in options.at),
        *(parse_box(text, options.coordinates) for text in options.box),
        *(read_points(options.points, options.coordinates) if options.points else ()),
    ]


def _line(row: dict[str, Any]) -> str:
    place = ", ".join(f"{row[f'{axis}_lps_mm']:g}" for axis in "xyz")
    head = f"point {row['point']} ({place} mm LPS): "
    if not row["found"]:
        return head + row["reason"]
    stable = "" if row["stability"] is None else f", stability {row['stability']:.2f}"
    return head + (
        f"{row['volume_ml']:.2f} ml, {row['longest_diameter_mm']:.1f} x {row['short_diameter_mm']:.1f} mm, mean "
        f"{row['mean_intensity']:.0f}, {100 * row['solid_share']:.0f} % solid{stable}"
    )
