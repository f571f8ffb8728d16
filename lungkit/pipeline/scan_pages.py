"""Pages of single scans for the browser: of a prediction, of a measured case, of files that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungkit._atomic import make_folder
from lungkit.data import Volume
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.data.geometry import Geometry, on_grid_of, orient, plan_geometry
from lungkit.inference import Prediction, Predictor
from lungkit.metrics import CaseRow, CaseTable
from lungkit.pipeline.inputs import LoadedScan
from lungkit.report import format_value, metric_title
from lungkit.report.evaluation import LabelScheme, class_indices
from lungkit.report.html import MAX_VOXELS, Case, MapLayer, MaskLayer, write_case_page

_PATIENT = {
    "PatientName": "Patient",
    "PatientID": "Patient ID",
    "PatientSex": "Sex",
    "PatientAge": "Age",
    "StudyDate": "Study date",
    "SeriesDescription": "Series",
}
_SHOWN_METRICS = ("dice", "iou", "ppv", "sensitivity", "lesion_f1")
_SHOWN_BEGINNINGS = ("hd", "nsd", "assd")


def write_prediction_page(
    path: Path,
    name: str,
    scan: LoadedScan,
    prediction: Prediction,
    predictor: Predictor,
    *,
    index: str | None = None,
    patient_data: bool = False,
) -> None:
    """Write the page of a scan that was just predicted: mask, and probabilities and attention where they were kept.

    Args:
        path: file to write.
        name: of the scan.
        scan: as it was read.
        prediction: of it.
        predictor: that made it.
        index: address of the page that lists the scans.
        patient_data: whether the patient's name, ID, sex, age and date in a DICOM header are shown.
    """
    geometry = plan_geometry(scan.volumes[0])
    maps = [
        MapLayer(f"probability of {label}", orient(array, geometry), label)
        for label, array in prediction.probabilities.items()
    ]
    if prediction.attention is not None:
        maps.append(MapLayer("attention", orient(prediction.attention, geometry)))
    facts = {
        **(patient_facts(scan) if patient_data else {}),
        "Model": ", ".join(model.name for model in predictor.models),
        "Computed on": f"{prediction.device}, {prediction.precision}, {prediction.seconds:.1f} s",
    }
    make_folder(path.parent)
    write_case_page(
        path,
        Case(
            name=name,
            geometry=geometry,
            image=orient(scan.volumes[0].array, geometry),
            masks=[MaskLayer("prediction", orient(prediction.mask, geometry), prediction.labels)],
            maps=maps,
            facts=facts,
            warnings=prediction.warnings,
            index=index,
        ),
    )


def write_measured_page(
    path: Path,
    name: str,
    label: Volume,
    scheme: LabelScheme,
    predictions: Mapping[str, Volume],
    tables: Mapping[str, CaseTable],
    *,
    image: Volume | None = None,
    attention: Mapping[str, np.ndarray] | None = None,
    index: str | None = None,
) -> None:
    """Write the page of a case with its truth: the masks of one or several models, and what was measured of them.

    Args:
        path: file to write.
        name: of the case.
        label: the true mask.
        scheme: what the values of all masks mean.
        predictions: mask of every model on the grid of ``label``; a single model may be called "".
        tables: what was measured, by the same names.
        image: the scan on that grid.
        attention: map of every model, on the same grid, as its file has it.
        index: address of the page that lists the cases.
    """
    geometry = plan_geometry(label)
    labels = scheme.class_indices

    def shown(volume: Volume) -> np.ndarray:
        indices = class_indices(on_grid_of(volume, label), scheme, geometry)
        return np.where(indices == IGNORE_INDEX, 0, indices)

    masks = [MaskLayer(model or "prediction", shown(mask), labels) for model, mask in predictions.items()]
    masks.append(MaskLayer("truth", shown(label), labels, "truth"))
    measured = {
        " · ".join(
            filter(None, [model or "prediction", row.label if len(table.labels) > 1 else ""])
        ): _metrics(row)
        for model, table in tables.items()
        for row in table.rows
        if row.case_id == name
    }
    maps = [
        MapLayer(f"attention {model}".strip(), orient(array, geometry))
        for model, array in (attention or {}).items()
    ]
    make_folder(path.parent)
    write_case_page(
        path,
        Case(
            name=name,
            geometry=geometry,
            image=None if image is None else orient(on_grid_of(image, label).array, geometry),
            masks=masks,
            maps=maps,
            measured=measured,
            index=index,
        ),
    )


def write_files_page(
    path: Path,
    name: str,
    scan: LoadedScan,
    masks: Sequence[tuple[str, Volume]],
    *,
    labels: Mapping[str, int] | None = None,
    maps: Sequence[tuple[str, str | None, Volume]] = (),
    facts: Mapping[str, str] | None = None,
    index: str | None = None,
    patient_data: bool = False,
    max_voxels: int = MAX_VOXELS,
) -> None:
    """Write the page of a scan and any masks and maps of it.

    Args:
        path: file to write.
        name: heading.
        scan: as it was read.
        masks: (name, mask); one called "truth" is drawn as such, one whose name begins with "reader" as a reader's.
        labels: class -> value in the masks; where not given every value is a class of its own.
        maps: (name, class, map from 0 to 1).
        facts: name -> text.
        index: address of the page that lists the scans.
        patient_data: whether what a DICOM header says of the patient is shown.
        max_voxels: above these the scan is halved.

    Raises:
        DataError: a mask or map lies on another grid.
    """
    first = scan.volumes[0]
    geometry = plan_geometry(first)
    known = labels or _values_in([mask.array for _, mask in masks])
    layers = [MaskLayer(title, _on_scan(mask, first, geometry), known, _role(title)) for title, mask in masks]
    colours = [MapLayer(title, _on_scan(map_, first, geometry), label) for title, label, map_ in maps]
    make_folder(path.parent)
    write_case_page(
        path,
        Case(
            name=name,
            geometry=geometry,
            image=orient(first.array, geometry),
            masks=layers,
            maps=colours,
            facts={**(patient_facts(scan) if patient_data else {}), **(facts or {})},
            index=index,
        ),
        max_voxels=max_voxels,
    )


def patient_facts(scan: LoadedScan) -> dict[str, str]:
    """What the DICOM header of a scan says of the patient; nothing of a NIfTI file."""
    if scan.dicom is None or not scan.dicom.headers:
        return {}
    header: Any = scan.dicom.headers[0]
    found = {title: str(getattr(header, keyword, "") or "") for keyword, title in _PATIENT.items()}
    return {title: text for title, text in found.items() if text}


def _on_scan(volume: Volume, scan: Volume, geometry: Geometry) -> np.ndarray:
    return orient(on_grid_of(volume, scan).array, geometry)


def _role(title: str) -> Any:
    if title == "truth":
        return "truth"
    return "reader" if title.startswith("reader") else "prediction"


def _values_in(masks: Sequence[np.ndarray]) -> dict[str, int]:
    values = sorted({int(value) for mask in masks for value in np.unique(mask)} - {0})
    return {"foreground": values[0]} if len(values) == 1 else {f"value {value}": value for value in values}


def _metrics(row: CaseRow) -> dict[str, str]:
    return {
        metric_title(name): format_value(name, value)
        for name, value in row.values.items()
        if name in _SHOWN_METRICS or name.startswith(_SHOWN_BEGINNINGS)
    }
