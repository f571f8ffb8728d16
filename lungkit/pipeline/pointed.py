"""Points and boxes out of text and tables, and what is measured of the nodules at them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lungkit._atomic import write_text_atomic
from lungkit._reading import read_text
from lungkit._text import csv_cell
from lungkit.data.geometry import orient, plan_geometry
from lungkit.data.volume import Volume
from lungkit.errors import DataError, UsageError
from lungkit.inference import Box, PointedPrediction
from lungkit.pipeline.measurements import measure_mask

Coordinates = Literal["lps", "ras"]
Point = tuple[float, float, float]
SOLID_ABOVE_HU = -300.0
"""From here on a voxel of a nodule counts as solid, below as ground glass."""


def parse_point(text: str, coordinates: Coordinates, *, what: str = "--at") -> Point:
    """ "X,Y,Z" in mm as (x, y, z) to the right, front and head.

    Args:
        text: three numbers with commas between them.
        coordinates: "lps" (DICOM: to the left, back and head) or "ras" (nibabel, NIfTI).
        what: names the text in errors.

    Raises:
        UsageError: not three finite numbers.

    Example:
        >>> parse_point("10,-20.5,300", "lps")
        (-10.0, 20.5, 300.0)
    """
    x, y, z = _numbers(text, 3, what)
    return (-x + 0.0, -y + 0.0, z) if coordinates == "lps" else (x, y, z)


def parse_box(text: str, coordinates: Coordinates) -> Box:
    """ "X1,Y1,Z1,X2,Y2,Z2", two opposite corners, see :func:`parse_point`."""
    numbers = _numbers(text, 6, "--box")
    first, second = (
        parse_point(",".join(map(str, corner)), coordinates) for corner in (numbers[:3], numbers[3:])
    )
    return Box(first, second)


def read_points(path: Path, coordinates: Coordinates) -> list[Point]:
    """The points of a CSV file with columns x, y and z in mm; other columns are left alone.

    Raises:
        DataError: no such columns, a line without three numbers (names the line), or no line.
    """
    try:
        text = read_text(path, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table of points ({error})") from error
    rows = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    names = {name.strip().lower(): name for name in rows.fieldnames or () if name}
    missing = [name for name in "xyz" if name not in names]
    if missing:
        found = ", ".join(rows.fieldnames or ()) or "nothing"
        raise DataError(f"{path}: columns x, y and z (mm) are needed, separated by commas; found {found}")
    points = []
    for row in rows:
        line = ",".join(str(row[names[name]]) for name in "xyz")
        try:
            points.append(parse_point(line, coordinates, what=f"line {rows.line_num}"))
        except UsageError as error:
            raise DataError(f"{path}: {error}") from error
    if not points:
        raise DataError(f"{path}: holds no point below its line of names")
    return points


def _numbers(text: str, count: int, what: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        names = ",".join("XYZ" if count == 3 else ["X1", "Y1", "Z1", "X2", "Y2", "Z2"])
        raise UsageError(f"{what} {text}: expected {names}, {count} numbers in mm with commas between them")
    return numbers


def measure_points(
    prediction: PointedPrediction, scan: Volume, *, solid_above: float = SOLID_ABOVE_HU
) -> list[dict[str, Any]]:
    """A row for every point: where, whether a nodule was found and why not, and its measures.

    Volume in ml and axial diameters as in :func:`lungkit.pipeline.measure_mask`, mean intensity (HU for CT), the share
    of its voxels at or above ``solid_above``, and the stability of the mask, see
    :class:`lungkit.inference.PointedNodule`.
    """
    found = measure_mask(prediction.mask, prediction.affine, prediction.labels, image=scan.array)
    geometry = plan_geometry(scan)
    mask, slices = orient(prediction.mask, geometry), orient(scan.array, geometry)
    rows = []
    for nodule in prediction.nodules:
        x, y, z = nodule.point_ras_mm
        row: dict[str, Any] = {
            "point": nodule.number,
            "x_lps_mm": -x + 0.0,
            "y_lps_mm": -y + 0.0,
            "z_lps_mm": z,
            "found": nodule.found,
            "reason": nodule.reason,
        }
        if nodule.found:
            measures = found[f"nodule {nodule.number}"]
            largest = measures["lesions"][0]
            solid = _share_above(mask, slices, nodule.number, solid_above)
            row |= {
                "volume_ml": measures["volume_ml"],
                "longest_diameter_mm": largest["longest_diameter_mm"],
                "short_diameter_mm": largest["short_diameter_mm"],
                "mean_intensity": largest["mean_intensity"],
                "solid_share": round(solid, 3),
                "stability": None if math.isnan(nodule.stability) else round(nodule.stability, 3),
            }
        rows.append(row)
    return rows


def _share_above(mask: np.ndarray, slices: np.ndarray, number: int, least: float) -> float:
    above = voxels = 0
    for plane, values in zip(mask, slices, strict=True):
        inside = plane == number
        voxels += int(inside.sum())
        above += int((values[inside] >= least).sum())
    return above / voxels


def write_points(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as CSV, whole or not at all."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(map(csv_cell, names))
    for row in rows:
        cells = [row.get(name, "") for name in names]
        table.writerow([csv_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    write_text_atomic(path, text.getvalue())
