"""The page of one scan: the viewer with its masks and maps, the lesions, the numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lungkit.data.geometry import Geometry
from lungkit.data.preprocessing import WINDOW_PRESETS_HU
from lungkit.errors import UsageError
from lungkit.report.html.controls import findings_panel, layers_panel, toolbar
from lungkit.report.html.lesions import Lesion, find_lesions, lps_matrix
from lungkit.report.html.markup import Markup, element, join
from lungkit.report.html.page import json_block, write_page
from lungkit.report.html.volumes import (
    MAX_VOXELS,
    PackedVolume,
    is_hounsfield,
    pack_image,
    pack_map,
    pack_mask,
)

Role = Literal["prediction", "truth", "reader"]

# Okabe and Ito's palette, which colour-blind people tell apart; on the black of the viewer.
_TRUTH_COLOUR = "#56b4e9"
_COLOURS = ("#e69f00", "#f0e442", "#cc79a7", "#d55e00", "#2fc49a", "#ffffff")
_SAMPLE = 1_000_000
_MOST_LESIONS = 200  # listed of a mask


@dataclass(frozen=True)
class MaskLayer:
    """A mask (Z, Y, X) of class indices in RAS+ on the scan's grid, and the class of every index but 0."""

    name: str
    mask: np.ndarray
    labels: Mapping[str, int]
    role: Role = "prediction"


@dataclass(frozen=True)
class MapLayer:
    """A map (Z, Y, X) over the scan, such as the probability of a class (``label``) or attention."""

    name: str
    values: np.ndarray
    label: str | None = None


@dataclass(frozen=True)
class Case:
    """What the page of a scan shows.

    Args:
        name: heading.
        geometry: of the scan, from :func:`lungkit.data.geometry.plan_geometry`.
        image: grey values (Z, Y, X) in RAS+; None where there are masks alone.
        masks: drawn as contours, and listed lesion by lesion.
        maps: drawn as colours.
        facts: name -> text, shown beside the viewer.
        warnings: shown above it.
        measured: mask layer -> metric -> value as text.
        index: address of the page that lists the scans, relative to this page.
    """

    name: str
    geometry: Geometry
    image: np.ndarray | None = None
    masks: Sequence[MaskLayer] = ()
    maps: Sequence[MapLayer] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    measured: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    index: str | None = None


def write_case_page(path: str | os.PathLike[str], case: Case, *, max_voxels: int = MAX_VOXELS) -> None:
    """Write the page of a scan as one file that works without a network.

    Grey values and maps of more than ``max_voxels`` voxels are halved, as the page says; masks are not, nor are the
    lesions measured on anything but the scan's own voxels.

    Raises:
        UsageError: shapes do not agree, or ``path`` holds a file that lungkit did not write.
        ResourceError: the disk is full.
    """
    shape = _shape_of(case)
    spacing = case.geometry.spacing_mm
    image = None if case.image is None else pack_image(case.image, spacing, max_voxels=max_voxels)
    lesions = {layer.name: _lesions(case, layer) for layer in case.masks}
    layers = list(_mask_entries(case))
    maps = [
        (
            {"id": f"map-{number}", "name": layer.name, "shown": False},
            pack_map(layer.values, spacing, max_voxels=max_voxels),
        )
        for number, layer in enumerate(case.maps)
    ]
    hounsfield = case.image is not None and is_hounsfield(case.image)
    presets = _windows(case.image, hounsfield)
    packed = ([("image", image)] if image else []) + [
        (str(entry["id"]), volume) for entry, volume in [*layers, *maps]
    ]
    first = next((found[0] for found, _ in lesions.values() if found), None)
    scan = {
        "shape": [shape[2], shape[1], shape[0]],
        "spacing": [spacing[2], spacing[1], spacing[0]],
        "to_lps": lps_matrix(case.geometry).round(6).tolist(),
        "start": list(first.voxel) if first else [size // 2 for size in shape[::-1]],
        "window": list(presets[0][1]),
        "grain": max(1.0 if hounsfield else (image.scale if image else 1.0), 1e-9),
        "unit": "HU" if hounsfield else "",
        "image": None if image is None else image.to_dict("volume-image"),
        "masks": [{**entry, **volume.to_dict(f"volume-{entry['id']}")} for entry, volume in layers],
        "maps": [{**entry, **volume.to_dict(f"volume-{entry['id']}")} for entry, volume in maps],
    }
    entries, map_entries = [entry for entry, _ in layers], [entry for entry, _ in maps]
    facts = {**_facts(case, shape, image), **case.facts}
    write_page(
        path,
        case.name,
        [
            _header(case),
            *(element("p", text, class_="warning") for text in case.warnings),
            element(
                "main",
                element(
                    "section",
                    element("p", "Unpacking the scan …", class_="status", role="status"),
                    toolbar(presets, models=sum(bool(entry["model"]) for entry in entries)),
                    element("div", class_="panes", data_tool="cross"),
                    layers_panel(entries, map_entries, facts, unit=hounsfield),
                    class_="viewer",
                    aria_label="Viewer",
                ),
                findings_panel(lesions, unit="HU" if hounsfield else None),
                _measured(case.measured),
            ),
        ],
        scripts=("volumes.js", "planes.js", "viewer.js"),
        data=[
            json_block("scan", scan),
            *(
                (f"volume-{identifier}", "application/gzip;base64", volume.text)
                for identifier, volume in packed
            ),
        ],
    )


def _shape_of(case: Case) -> tuple[int, int, int]:
    shape = case.geometry.oriented_shape
    for what, array in [
        *([("the image", case.image)] if case.image is not None else []),
        *((f"mask {layer.name!r}", layer.mask) for layer in case.masks),
        *((f"map {layer.name!r}", layer.values) for layer in case.maps),
    ]:
        if array.shape != shape:
            raise UsageError(
                f"{case.name}: {what} has shape {array.shape}, the scan {shape} (z, y, x); give all on the scan's grid"
            )
    return shape


def _lesions(case: Case, layer: MaskLayer) -> tuple[list[Lesion], int]:
    # Of several models nobody says whose the probabilities are.
    predictions = [one.name for one in case.masks if one.role == "prediction"]
    own = [one for one in case.maps if one.label is not None] if predictions == [layer.name] else []
    probabilities = {one.label: one.values for one in own if one.label is not None}
    return find_lesions(
        layer.mask,
        case.geometry,
        layer.labels,
        image=case.image,
        probabilities=probabilities,
        most=_MOST_LESIONS,
    )


def _mask_entries(case: Case) -> Iterator[tuple[dict[str, Any], PackedVolume]]:
    """Every mask with its colours: a class each where there are several classes, else a mask each."""
    classes = list(
        dict.fromkeys(name for layer in case.masks for name, value in layer.labels.items() if value != 0)
    )
    used = 0
    for number, layer in enumerate(case.masks):
        truth = layer.role == "truth"
        shown = []
        for name, value in layer.labels.items():
            if value == 0:
                continue
            if len(classes) > 1:
                colour = _COLOURS[classes.index(name) % len(_COLOURS)]
            elif truth:
                colour = _TRUTH_COLOUR
            else:
                colour = _COLOURS[used % len(_COLOURS)]
                used += 1
            shown.append({"name": name, "value": value, "colour": colour})
        entry = {
            "id": f"mask-{number}",
            "name": layer.name,
            "model": not truth,
            "dashed": truth,
            "classes": shown,
        }
        yield entry, pack_mask(layer.mask)


def _windows(image: np.ndarray | None, hounsfield: bool) -> list[tuple[str, tuple[float, float]]]:
    if hounsfield:
        # Wider than what networks see: the radiologist's lung window, width 1500 at level -600.
        return [
            ("Lung", (-1350.0, 150.0)),
            ("Mediastinum", WINDOW_PRESETS_HU["mediastinum"]),
            ("Bone", (-450.0, 1050.0)),
        ]
    if image is None:
        return [("All", (0.0, 1.0))]
    sample = image.reshape(-1)[:: max(1, image.size // _SAMPLE)]
    low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5)))
    whole = float(image.min()), float(image.max())
    return [("Most", (low, max(high, low + 1e-3))), ("All", (whole[0], max(whole[1], whole[0] + 1e-3)))]


def _facts(case: Case, shape: Sequence[int], image: PackedVolume | None) -> dict[str, str]:
    size = " × ".join(map(str, shape[::-1]))
    spacing = " × ".join(f"{step:.3g}" for step in case.geometry.spacing_mm[::-1])
    facts = {"Voxels": size, "Spacing": f"{spacing} mm"}
    if image is None:
        facts["Scan"] = "not given: masks alone"
    elif max(image.factor) > 1:
        step = " × ".join(map(str, image.factor))
        facts["Shown at"] = (
            f"1 / ({step}) of its resolution, by size; masks and measurements are at full resolution"
        )
    return facts


def _header(case: Case) -> Markup:
    back = element("a", "All scans", href=case.index) if case.index else None
    return element("header", element("h1", case.name), element("p", back) if back else None)


def _measured(measured: Mapping[str, Mapping[str, str]]) -> Markup | None:
    if not measured:
        return None
    metrics = list(dict.fromkeys(name for values in measured.values() for name in values))
    head = element("tr", element("th", ""), *(element("th", name, class_="number") for name in metrics))
    rows = [
        element(
            "tr",
            element("th", layer, scope="row"),
            *(element("td", values.get(name, "-"), class_="number") for name in metrics),
        )
        for layer, values in measured.items()
    ]
    table = element("table", element("thead", head), element("tbody", *rows))
    return join(element("h2", "Against the truth"), element("div", table, class_="scroll"))
