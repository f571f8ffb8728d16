"""Evaluation of a folder of predictions against a folder of labels: pairs read, checked and measured."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

import lungkit
from lungkit._atomic import make_folder
from lungkit.data import Volume, open_dataset
from lungkit.data.dataset import (
    BLACK_AND_WHITE,
    IGNORE_INDEX,
    MAX_LABEL_VALUE,
    is_black_and_white,
    map_labels,
)
from lungkit.data.geometry import Geometry, on_grid_of, orient, plan_geometry
from lungkit.data.layouts import read_declared_labels
from lungkit.errors import LungkitError, UsageError
from lungkit.metrics import CaseTable, Measurement, MetricGroup, MetricOptions, measure_case
from lungkit.report.distributions import save_distributions
from lungkit.report.mask_files import CasePairs, MaskReader, masks_in
from lungkit.report.pictures import optional_picture
from lungkit.report.tables import format_case_table, metric_title, write_case_table

_LOG = logging.getLogger("lungkit")

_CASES_SHOWN = 5  # where there are many


@dataclass(frozen=True)
class LabelScheme:
    """What the values of the mask files mean: ``values`` from name to value, and the value to ignore.

    ``regions`` are measured in place of classes: region -> the values that belong to it.
    """

    values: Mapping[str, int]
    ignore_value: int | None = None
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def class_indices(self) -> dict[str, int]:
        """Name -> class index 0..K-1, in ascending order of the values; the background is 0."""
        names = sorted(self.values, key=self.values.__getitem__)
        return {name: index for index, name in enumerate(names)}

    @property
    def label_map(self) -> dict[int, int]:
        """Value in a file -> class index, the ignored value -> 255."""
        mapping = {self.values[name]: index for name, index in self.class_indices.items()}
        if self.ignore_value is not None:
            mapping[self.ignore_value] = IGNORE_INDEX
        return mapping


FOREGROUND = LabelScheme({"background": 0, "foreground": 1})
"""Masks of one class without a name."""


@dataclass
class Evaluation:
    """Metrics of all cases that could be measured, and what was wrong with the others."""

    table: CaseTable
    failed: dict[str, str] = field(default_factory=dict)
    """Case id -> message."""


def find_label_scheme(labels: str | os.PathLike[str]) -> LabelScheme:
    """Names and values of the classes from the ``dataset.json`` in the folder of the labels or the one above.

    A dataset of plain folders, which has none, has the labels of :func:`lungkit.data.open_dataset`. Elsewhere masks
    hold 0 and 1 and the class is called "foreground".

    Raises:
        DataError: the ``dataset.json`` cannot be read or declares no labels.
    """
    folder = Path(labels) if Path(labels).is_dir() else Path(labels).parent
    for candidate in (folder / "dataset.json", folder.parent / "dataset.json"):
        if candidate.is_file():
            return LabelScheme(*read_declared_labels(candidate))
    if Path(labels).is_dir() and not masks_in(folder):
        dataset = open_dataset(folder)
        return LabelScheme(dataset.labels, dataset.ignore_label, dataset.regions)
    return FOREGROUND


def evaluate_pairs(
    pairs: Mapping[str, tuple[Path, Path]],
    scheme: LabelScheme = FOREGROUND,
    *,
    options: MetricOptions | None = None,
    jobs: int = 1,
    reader: MaskReader | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Measure every pair of files; one that cannot be measured is reported and stops none of the others.

    Prediction and label must lie on one grid (:func:`lungkit.data.geometry.on_grid_of`). They are measured in RAS+ with
    axial slices, so that the diameter of a lesion is in the axial plane however the file is stored.

    Args:
        pairs: case id -> (prediction, label).
        scheme: what the values of the files mean.
        options: which metrics, under which definitions.
        jobs: cases measured at the same time, in threads; the result does not depend on it.
        reader: reads a pair; how, is said there. None: NIfTI, and DICOM whose structures are called like the classes.
        progress: called with the case id, the cases done and the cases in all.

    Returns:
        the rows in the order of ``pairs``.
    """
    options = options or MetricOptions()
    reader = reader or MaskReader(scheme.values)
    if jobs < 1:
        raise UsageError(f"jobs must be at least 1, got {jobs}")
    # With one case at a time its surfaces may use every core; with several, each has one.
    threads = 1 if jobs > 1 else None

    def measure(item: tuple[str, tuple[Path, Path]]) -> tuple[str, dict[str, Measurement] | str]:
        case_id, (prediction, label) = item
        try:
            predicted, true = reader.read(prediction, label)
            return case_id, measure_volumes(predicted, true, scheme, options=options, threads=threads)
        except LungkitError as error:
            return case_id, str(error)

    evaluation = Evaluation(CaseTable(empty=options.empty))
    with ThreadPoolExecutor(jobs) as pool:
        for done, (case_id, result) in enumerate(pool.map(measure, pairs.items()), start=1):
            if isinstance(result, str):
                evaluation.failed[case_id] = result
            else:
                for label, measurement in result.items():
                    evaluation.table.add_row(
                        case_id, label, measurement.values, measurement.decided_by_policy
                    )
            if progress is not None:
                progress(case_id, done, len(pairs))
    return evaluation


def measure_volumes(
    prediction: Volume,
    label: Volume,
    scheme: LabelScheme = FOREGROUND,
    *,
    options: MetricOptions | None = None,
    threads: int | None = None,
) -> dict[str, Measurement]:
    """Measure one predicted mask against the true one, as :func:`evaluate_pairs` does with files.

    Args:
        prediction: mask of the values of ``scheme``.
        label: the true mask, on the same grid.
        scheme: what the values mean.
        options: which metrics, under which definitions.
        threads: CPU threads for the surface distances.

    Raises:
        DataError: the grids differ, or a mask holds a value that is not in ``scheme``.

    Example:
        >>> mask = np.zeros((8, 8, 4), np.uint8)
        >>> mask[2:6, 2:6, 1:3] = 1
        >>> volume = Volume(mask, np.diag([-1.0, -1.0, 2.5, 1.0]))
        >>> measure_volumes(volume, volume)["foreground"].values["volume_true_ml"]
        0.08
    """
    prediction = on_grid_of(prediction, label)
    geometry = plan_geometry(label)
    predicted, truth = (class_indices(volume, scheme, geometry) for volume in (prediction, label))
    # A prediction has no voxels to ignore: where it says so nonetheless, it says background.
    if scheme.ignore_value is not None:
        predicted = np.where(predicted == IGNORE_INDEX, 0, predicted)
    measure = partial(
        measure_case,
        spacing_mm=geometry.spacing_mm,
        options=options,
        ignore_index=None if scheme.ignore_value is None else IGNORE_INDEX,
        threads=threads,
    )
    if not scheme.regions:
        return measure(predicted, truth, scheme.class_indices)
    measured: dict[str, Measurement] = {}
    for name, values in scheme.regions.items():
        inside = np.zeros(256, np.uint8)
        inside[[scheme.label_map[value] for value in values]] = 1
        inside[IGNORE_INDEX] = IGNORE_INDEX
        measured |= measure(inside[predicted], inside[truth], {"background": 0, name: 1})
    return measured


def class_indices(mask: Volume, scheme: LabelScheme, geometry: Geometry) -> np.ndarray:
    """Class indices of a mask, 255 where it is to be ignored; uint8 (Z, Y, X) in RAS+."""
    if mask.path is not None and is_black_and_white(mask.array, scheme.label_map):
        _say_black_and_white(mask.path.parent)
    return orient(map_labels(mask.array, scheme.label_map, str(mask.path)), geometry)


@cache
def _say_black_and_white(folder: Path) -> None:
    _LOG.warning("%s: %s", folder, BLACK_AND_WHITE)


def parse_labels(texts: Sequence[str]) -> LabelScheme:
    """Labels from texts "name=value", as a command line gives them; the name "ignore" marks the value to ignore.

    Raises:
        UsageError: a text of another form, or a value used twice.

    Example:
        >>> parse_labels(["tumour=1", "ignore=255"])
        LabelScheme(values={'background': 0, 'tumour': 1}, ignore_value=255, regions={})
    """
    values = {"background": 0}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value.isdigit() or int(value) > MAX_LABEL_VALUE:
            raise UsageError(
                f"label {text!r} must be NAME=VALUE with a value from 1 to {MAX_LABEL_VALUE}, e.g. tumour=1"
            )
        values[name] = int(value)
    if len(set(values.values())) < len(values):
        raise UsageError(
            f"labels must have different values, and 0 is the background; got {', '.join(texts)}"
        )
    ignore = values.pop("ignore", None)
    return LabelScheme(values, ignore)


def write_evaluation(
    folder: str | os.PathLike[str],
    evaluation: Evaluation,
    found: CasePairs,
    options: MetricOptions,
    scheme: LabelScheme,
    *,
    notes: Sequence[str] = (),
) -> str:
    """Write the tables and the plot of an evaluation into a folder, made if absent; returns the table to show.

    The table returned leaves single cases out where there are more than fit a screen; the files hold them all.
    ``notes`` are lines below the table, before the definitions. ``metrics.json`` holds the definition of every metric,
    the versions and the cases that were not measured.
    """
    folder = Path(folder)
    make_folder(folder)
    table = evaluation.table
    extra = {
        "lungkit": lungkit.__version__,
        "labels": dict(scheme.values),
        **(
            {"regions": {name: list(values) for name, values in scheme.regions.items()}}
            if scheme.regions
            else {}
        ),
        "ignored_value": scheme.ignore_value,
        "failed": evaluation.failed,
        "without_prediction": list(found.without_prediction),
        "without_label": list(found.without_label),
    }
    text = write_measured(folder, table, options, notes=notes, extra=extra)
    if table.rows:
        shown = [name for name in headline_metrics(options) if name in table.metrics]
        with optional_picture(folder / "distribution.png"):
            save_distributions(folder / "distribution.png", table, shown)
    return text


def write_measured(
    folder: Path,
    table: CaseTable,
    options: MetricOptions,
    *,
    name: str = "metrics",
    notes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write a table with the definitions of its metrics; returns the table to show.

    The table returned shows the worst cases where there are many. Arguments and errors are those
    of :func:`lungkit.report.write_case_table`; ``options`` are those that the table was measured with.
    """
    definitions = options.definitions()
    shown = [metric for metric in headline_metrics(options) if metric in table.metrics]
    notes = [*notes, *(f"{metric_title(metric)}: {definitions[metric]}." for metric in shown)]
    extra = {**(extra or {}), "definitions": definitions}
    write_case_table(folder, table, name=name, metrics=shown, notes=notes, extra=extra)
    return "\n".join([format_case_table(table, metrics=shown, worst=_CASES_SHOWN), "", *notes])


def headline_metrics(options: MetricOptions) -> tuple[str, ...]:
    """The metrics of the readable table; the other files hold all."""
    surface = (options.hausdorff_name, options.surface_dice_name, "assd_pooled_mm")
    overlap = ("dice", "iou", "ppv", "sensitivity")
    if MetricGroup.OVERLAP in options.groups or MetricGroup.SURFACE in options.groups:
        return (*overlap, *surface, "lesion_f1")
    return tuple(options.definitions())
