"""Predictions against several readers: tables with the readers' own agreement, calibration, a reliability diagram."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lungkit._atomic import atomic_path, write_json_atomic
from lungkit.data import Dataset, open_dataset, read_volume
from lungkit.data.geometry import on_grid_of, orient, plan_geometry
from lungkit.data.readers import ReaderCodes, read_codes
from lungkit.metrics import CaseTable
from lungkit.metrics.agreement import (
    AGREEMENT_DEFINITIONS,
    AGREEMENT_METRICS,
    CONSENSUS,
    agreement_metrics,
    pairwise_dice,
)
from lungkit.metrics.calibration import Calibration
from lungkit.report.evaluation import LabelScheme, class_indices
from lungkit.report.mask_files import MaskReader, probability_name
from lungkit.report.pictures import optional_picture
from lungkit.report.tables import format_case_table, format_value, metric_title, write_case_table

_NEAR = 0.01
REGIONS = {
    "all": "all voxels",
    "near": f"voxels that a reader marked or whose probability is {_NEAR:g} or more",
}


@dataclass
class ReaderMeasurements:
    """What predictions are worth beside the readers: filled case by case, on the grid of the files.

    Args:
        codes: of what the readers say.
        classes: class name -> class index, the background included.
    """

    codes: ReaderCodes
    classes: Mapping[str, int]
    table: CaseTable = field(default_factory=CaseTable)
    pairs: dict[str, list[float]] = field(default_factory=dict)
    """Dice of two readers, pooled over the pairs, of each case, by class."""
    calibration: dict[tuple[str, str], Calibration] = field(default_factory=dict)
    """By class and region of :data:`REGIONS`."""

    def add(
        self,
        case_id: str,
        mask: np.ndarray,
        codes: np.ndarray,
        consensus: np.ndarray,
        probabilities: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Measure one case; arrays are class indices, codes, class indices and probabilities of one shape."""
        readings = self.codes.readings(codes)
        readings[consensus == 255] = 0
        for name, index in self.classes.items():
            if index == 0:
                continue
            votes = np.minimum(self.codes.votes(codes, index), readings)
            found = agreement_metrics(mask == index, votes, readings, consensus == index)
            for level, values in found.items():
                self.table.add_row(case_id, self._target(name, level), values)
            self.pairs.setdefault(name, []).append(pairwise_dice(votes, readings))
            if probabilities is None or name not in probabilities:
                continue
            read = readings > 0
            share = votes[read] / readings[read]
            probability = np.clip(probabilities[name][read], 0.0, 1.0)
            near = (share > 0) | (probability >= _NEAR)
            for region, chosen in (("all", slice(None)), ("near", near)):
                seen = self.calibration.setdefault((name, region), Calibration())
                seen.add(probability[chosen], share[chosen])

    def merge(self, other: ReaderMeasurements) -> None:
        """Add the cases that another process has measured."""
        self.table.rows += other.table.rows
        for name, values in other.pairs.items():
            self.pairs.setdefault(name, []).extend(values)
        for key, calibration in other.calibration.items():
            self.calibration.setdefault(key, Calibration()).merge(calibration)

    def _target(self, name: str, level: str) -> str:
        if level == CONSENSUS:
            return f"{name}, {CONSENSUS}"
        return f"{name}, {level} of {self.codes.readers}" + (
            " or more" if int(level) < self.codes.readers else ""
        )

    def ceiling_notes(self) -> list[str]:
        """For the table of a model: what the readers themselves reach against the same labels."""
        notes = []
        for name, index in self.classes.items():
            target = self._target(name, CONSENSUS)
            if index == 0 or target not in self.table.labels:
                continue
            values = [row.values["readers_dice"] for row in self.table.of_label(target)]
            two = [value for value in self.pairs[name] if not math.isnan(value)]
            defined = [value for value in values if not math.isnan(value)]
            if not defined or not two:
                continue
            notes.append(
                f"Readers' own Dice, {name}: {format_value('dice', float(np.mean(defined)))} for one of "
                f"{self.codes.readers} against these labels, {format_value('dice', float(np.mean(two)))} for two "
                f"readers against each other (pooled over readers and pairs, means of {len(defined)} and {len(two)} "
                "cases)."
            )
        return notes

    def calibration_notes(self) -> list[str]:
        """Brier score and expected calibration error, in sentences."""
        return [
            f"Calibration, {name}, {REGIONS[region]}: Brier {seen.brier:.4f}, ECE {seen.ece:.4f} against the share of "
            f"readers ({seen.voxels} voxels)."
            for (name, region), seen in self.calibration.items()
        ]

    def write(self, folder: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> str:
        """Write ``readers.*``, of probabilities ``calibration.json`` and ``reliability.png``; returns what to show."""
        folder = Path(folder)
        notes = [
            *self.ceiling_notes(),
            *self.calibration_notes(),
            *(f"{metric_title(name)}: {meaning}." for name, meaning in AGREEMENT_DEFINITIONS.items()),
        ]
        write_case_table(
            folder,
            self.table,
            name="readers",
            metrics=AGREEMENT_METRICS,
            notes=notes,
            extra={**(extra or {}), "readers": self.codes.readers, "definitions": AGREEMENT_DEFINITIONS},
        )
        if self.calibration:
            write_json_atomic(folder / "calibration.json", self._calibration_content())
            with optional_picture(folder / "reliability.png"):
                save_reliability(folder / "reliability.png", self.calibration)
        shown = format_case_table(self.table, metrics=AGREEMENT_METRICS, cases=False)
        return "\n".join([shown, "", *notes])

    def _calibration_content(self) -> dict[str, Any]:
        content: dict[str, Any] = {"regions": REGIONS, "classes": {}}
        for (name, region), seen in self.calibration.items():
            predicted, observed, counts = (values.tolist() for values in seen.curve)
            content["classes"].setdefault(name, {})[region] = {
                "brier": seen.brier if seen.voxels else None,
                "ece": seen.ece if seen.voxels else None,
                "voxels": seen.voxels,
                "curve": {"predicted": predicted, "observed": observed, "voxels": counts},
            }
        return content


def save_reliability(
    path: str | os.PathLike[str], calibration: Mapping[tuple[str, str], Calibration]
) -> None:
    """Draw how often a thing is true where its probability is p, a panel a class, voxels of each bin below.

    Args:
        path: picture to write.
        calibration: by class and region of :data:`REGIONS`.

    Example:
        >>> import pathlib, tempfile
        >>> seen = Calibration()
        >>> seen.add(np.linspace(0, 1, 50), np.linspace(0, 1, 50) ** 2)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "reliability.png"
        >>> save_reliability(path, {("tumour", "all"): seen})
        >>> path.stat().st_size > 1000
        True
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = list(dict.fromkeys(name for name, _ in calibration))
    figure = Figure(figsize=(4.2 * len(classes), 4.8), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(classes), squeeze=False, sharex=True, height_ratios=[4, 1])
    for column, name in enumerate(classes):
        above, below = panels[0, column], panels[1, column]
        above.plot([0, 1], [0, 1], color="#9aa0a6", linewidth=1, linestyle="--")
        for region, colour in zip(REGIONS, ("#1f6fb4", "#e8612c"), strict=True):
            seen = calibration.get((name, region))
            if seen is None or not seen.voxels:
                continue
            predicted, observed, counts = seen.curve
            label = f"{region}: ECE {seen.ece:.3f}, Brier {seen.brier:.3f}"
            above.plot(predicted, observed, marker="o", markersize=3.5, color=colour, label=label)
            below.plot(predicted, counts, marker="o", markersize=2.5, color=colour)
        above.set_title(name, loc="left", fontsize=11, parse_math=False)
        above.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share of readers")
        above.legend(fontsize=8, frameon=False, loc="upper left")
        below.set(yscale="log", xlabel="predicted probability", ylabel="voxels")
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def dataset_of_readers(labels: str | os.PathLike[str]) -> Dataset | None:
    """The dataset that a folder of labels is or lies in, where it has several readers.

    Raises:
        DataError: it is one, and cannot be opened.
    """
    for folder in (Path(labels), Path(labels).parent):
        if not (folder / "dataset.json").is_file():
            continue
        has_folder = (folder / "votesTr").is_dir() or (folder / "readersTr").is_dir()
        dataset = open_dataset(folder) if has_folder else None
        return dataset if dataset is not None and dataset.readers is not None else None
    return None


def measure_pairs(
    measurements: ReaderMeasurements,
    pairs: Mapping[str, tuple[Path, Path]],
    dataset: Dataset,
    scheme: LabelScheme,
    reader: MaskReader,
    *,
    probabilities: Path | None = None,
) -> None:
    """Measure files beside what the readers of a dataset say; cases that no reader has marked are passed over.

    Args:
        measurements: where the cases are added.
        pairs: case id -> (prediction, label).
        dataset: with the readers' files.
        scheme: what the values of the masks mean.
        reader: reads a pair.
        probabilities: folder of CASE_CLASS.nii.gz, as ``lungkit-predict --probabilities`` writes them; a case that has
            none is measured without calibration.

    Raises:
        DataError: a file cannot be used.
    """
    cases = {case.case_id: case for case in dataset.cases if case.readers}
    for case_id, (prediction, label) in pairs.items():
        if case_id not in cases:
            continue
        mask, true = reader.read(prediction, label)
        mask = on_grid_of(mask, true)
        said = read_codes(
            cases[case_id], measurements.codes, scheme.label_map, true, max_voxels=reader.max_voxels
        )
        geometry = plan_geometry(true)
        predicted = class_indices(mask, scheme, geometry)
        maps = {}
        for name, index in measurements.classes.items():
            path = None if probabilities is None else probabilities / probability_name(case_id, name)
            if index and path is not None and path.is_file():
                volume = on_grid_of(read_volume(path, max_voxels=reader.max_voxels), true)
                maps[name] = orient(volume.array, geometry)
        consensus = class_indices(true, scheme, geometry)
        measurements.add(case_id, predicted, orient(said.array, geometry), consensus, maps)
