"""Labelled scans of a dataset: predicted as ``lungkit-predict`` does, measured as ``lungkit-evaluate`` does, drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungkit.data import DEFAULT_MAX_VOXELS, Dataset, NanPolicy, Volume, read_volume
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.data.geometry import orient, plan_geometry
from lungkit.data.readers import ReaderCodes, read_codes, reader_codes
from lungkit.errors import DataError
from lungkit.inference import Predictor
from lungkit.metrics import CaseTable, MetricOptions
from lungkit.pipeline.scan_pages import write_measured_page
from lungkit.report import choose_slice, save_overlays
from lungkit.report.evaluation import LabelScheme, class_indices, measure_volumes
from lungkit.report.pictures import optional_page, optional_picture
from lungkit.report.readers import ReaderMeasurements


@dataclass(frozen=True)
class LabelledScans:
    """Cases of a dataset that have masks, read when they are needed."""

    dataset: Dataset
    case_ids: tuple[str, ...]
    max_voxels: int = DEFAULT_MAX_VOXELS
    nan_policy: NanPolicy = NanPolicy.REFUSE

    @property
    def scheme(self) -> LabelScheme:
        """What the values of the masks mean."""
        return LabelScheme(self.dataset.labels, self.dataset.ignore_label, self.dataset.regions)

    def read(self, case_id: str) -> tuple[list[Volume], Volume]:
        """The channels of a scan and its mask, as their files hold them.

        Raises:
            DataError: a file cannot be read, or the case has no mask.
        """
        case = self.dataset.case(case_id)
        if case.label is None:
            raise DataError(f"case {case_id} of {self.dataset.root} has no mask to measure against")
        channels = [
            read_volume(path, max_voxels=self.max_voxels, nan_policy=self.nan_policy) for path in case.images
        ]
        return channels, read_volume(case.label, max_voxels=self.max_voxels)

    def read_codes(self, case_id: str, codes: ReaderCodes, label: Volume) -> Volume:
        """What the readers of a case say, on the grid of its mask.

        Raises:
            DataError: a file cannot be read or lies on another grid.
        """
        case = self.dataset.case(case_id)
        return read_codes(case, codes, self.dataset.label_map, label, max_voxels=self.max_voxels)


def measure_scans(
    predictor: Predictor,
    scans: LabelledScans,
    *,
    options: MetricOptions | None = None,
    masks: Path | None = None,
    readers: ReaderMeasurements | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CaseTable:
    """Predict every scan and measure the mask against the true one, on the grid of their files.

    Args:
        predictor: predicts with its own postprocessing.
        scans: what to measure.
        options: which metrics, under which definitions.
        masks: an existing folder, in which each mask is kept as CASE.nii.gz.
        readers: measures the prediction of each case beside what its readers say, where they said something.
        progress: called after each case with the cases done and the cases in all; may raise to give up.

    Returns:
        the rows in the order of the cases.

    Raises:
        DataError: a file cannot be used, or scan and mask lie on different grids.
    """
    options = options or MetricOptions()
    table = CaseTable(empty=options.empty)
    for done, case_id in enumerate(scans.case_ids, start=1):
        channels, label = scans.read(case_id)
        said = None
        if readers is not None and scans.dataset.case(case_id).readers:
            said = scans.read_codes(case_id, readers.codes, label)
        prediction = predictor(channels, probabilities=said is not None)
        if masks is not None:
            prediction.save(masks / f"{case_id}.nii.gz")
        mask = Volume(prediction.mask, prediction.affine, channels[0].path)
        for name, measured in measure_volumes(mask, label, scans.scheme, options=options).items():
            table.add_row(case_id, name, measured.values, measured.decided_by_policy)
        if readers is not None and said is not None:
            geometry = plan_geometry(label)
            readers.add(
                case_id,
                class_indices(mask, scans.scheme, geometry),
                orient(said.array, geometry),
                class_indices(label, scans.scheme, geometry),
                {name: orient(array, geometry) for name, array in prediction.probabilities.items()},
            )
        if progress is not None:
            progress(done, len(scans.case_ids))
    return table


def readers_ceiling(scans: Sequence[LabelledScans], *, readers: int | None = None) -> list[str]:
    """For a table of these scans: what their readers reach against the same labels, where they have several.

    Args:
        scans: of one dataset; a case in several of them counts once.
        readers: how many there were, where the dataset does not tell; of an unknown number nothing is said.

    Returns:
        sentences, see :meth:`lungkit.report.readers.ReaderMeasurements.ceiling_notes`.

    Raises:
        DataError: a file of a reader cannot be read.
    """
    dataset = scans[0].dataset
    count = readers or (None if dataset.readers is None else dataset.readers.count)
    if dataset.readers is None or count is None:
        return []
    measured = ReaderMeasurements(reader_codes(dataset, readers=readers), scans[0].scheme.class_indices)
    where = {case_id: part for part in scans for case_id in part.case_ids if dataset.case(case_id).readers}
    for case_id, part in where.items():
        label = read_volume(dataset.case(case_id).label or Path(), max_voxels=part.max_voxels)
        geometry = plan_geometry(label)
        truth = class_indices(label, part.scheme, geometry)
        said = orient(part.read_codes(case_id, measured.codes, label).array, geometry)
        measured.add(case_id, truth, said, truth)
    return measured.ceiling_notes()


def draw_overlays(
    folder: Path,
    predictors: Mapping[str, Predictor],
    scans: LabelledScans,
    tables: Mapping[str, CaseTable],
    *,
    pages: Path | None = None,
) -> None:
    """Draw into ``folder`` what was measured of the worst, the median and the best case.

    A picture shows one slice of the scan on its own grid, in the window that the first model was trained with, the
    true mask, and the mask and, of networks that have attention gates, the attention map of every predictor.

    Args:
        folder: an existing folder.
        predictors: by the name under which they are shown; a single one may be called "".
        scans: what was measured.
        tables: what :func:`measure_scans` gave for every predictor.
        pages: folder for pages of the same cases for the browser, CASE.html; None writes none.
    """
    for rank, case_id in representative_cases(tables).items():
        channels, label = scans.read(case_id)
        geometry = plan_geometry(label)
        truth = class_indices(label, scans.scheme, geometry)
        masks, attention, predicted, gates = {}, {}, {}, {}
        for name, predictor in predictors.items():
            gated = any(model.has_attention for model in predictor.models)
            prediction = predictor(channels, attention=gated)
            masks[name] = orient(prediction.mask, geometry)
            predicted[name] = Volume(prediction.mask, prediction.affine)
            if prediction.attention is not None:
                gates[name] = prediction.attention
                attention[name] = orient(prediction.attention, geometry)
        z = choose_slice(truth, next(iter(masks.values())), ignore_index=IGNORE_INDEX)
        dice = {name: next(row for row in t.rows if row.case_id == case_id) for name, t in tables.items()}
        shown = ", ".join(f"{name} {row.values['dice']:.3f}".strip() for name, row in dice.items())
        with optional_picture(folder / f"{rank}-{case_id}.png"):
            save_overlays(
                folder / f"{rank}-{case_id}.png",
                orient(channels[0].array, geometry),
                truth,
                masks,
                {name: alpha[z] for name, alpha in attention.items()},
                slice_index=z,
                spacing_mm=geometry.spacing_mm,
                window=next(iter(predictors.values())).models[0].preprocessing.channels[0].window,
                ignore_index=IGNORE_INDEX,
                title=f"{rank} held-out case {case_id} (Dice: {shown})",
            )
        if pages is not None:
            with optional_page(pages / f"{case_id}.html"):
                write_measured_page(
                    pages / f"{case_id}.html",
                    case_id,
                    label,
                    scans.scheme,
                    predicted,
                    tables,
                    image=channels[0],
                    attention=gates,
                    index="../report.html",
                )


def representative_cases(tables: Mapping[str, CaseTable]) -> dict[str, str]:
    """Worst, median and best case by the mean Dice of the first class over all tables, ties by name.

    The rule favours none of the tables, and no hand chooses. Cases without a Dice in one of them are left out.

    Example:
        >>> first, second = CaseTable(), CaseTable()
        >>> for case, dice in {"a": 0.9, "b": 0.2, "c": 0.7}.items():
        ...     first.add_row(case, "tumour", {"dice": dice})
        ...     second.add_row(case, "tumour", {"dice": dice - 0.1})
        >>> representative_cases({"A": first, "B": second})
        {'worst': 'b', 'median': 'c', 'best': 'a'}
    """
    dice: dict[str, list[float]] = {}
    for table in tables.values():
        for row in table.of_label(table.labels[0]) if table.rows else ():
            dice.setdefault(row.case_id, []).append(row.values["dice"])
    ranked = sorted(
        (float(np.mean(values)), case_id) for case_id, values in dice.items() if not np.isnan(values).any()
    )
    if not ranked:
        return {}
    return {"worst": ranked[0][1], "median": ranked[len(ranked) // 2][1], "best": ranked[-1][1]}
