"""Pages of predictions that lie in a folder, made from the masks and the scans they were predicted of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lungkit._reading import read_json
from lungkit.data import Volume, read_volume
from lungkit.errors import DataError, LungkitError, ResourceError, shorten
from lungkit.pipeline.inputs import ScanInput, find_scans
from lungkit.pipeline.scan_pages import write_files_page
from lungkit.report.html import MAX_VOXELS
from lungkit.report.html.summary_page import PAGES
from lungkit.report.mask_files import MaskReader, masks_in, probability_name


def write_prediction_pages(
    folder: Path,
    scans: Path,
    *,
    labels: Path | None = None,
    patient_data: bool = False,
    max_voxels: int = MAX_VOXELS,
) -> dict[str, str]:
    """Write ``pages/NAME.html`` of every mask in ``folder`` that has a scan of its name.

    Probabilities and attention maps that lie in the folder are shown as colours. A scan or a mask that cannot be used
    stops no other.

    Args:
        folder: of masks, as lungkit-predict writes it.
        scans: file or folder of the scans.
        labels: folder of true masks of the same names.
        patient_data: whether what a DICOM header says of the patient is shown.
        max_voxels: above these a scan is shown at half resolution.

    Returns:
        What was wrong with those that have no page, by name.

    Raises:
        DataError: no mask has a scan of its name.
    """
    masks = masks_in(folder)
    true = {} if labels is None else masks_in(labels)
    found = {scan.name: scan for scan in find_scans(scans).scans}
    if not masks.keys() & found.keys():
        raise DataError(
            f"{folder} and {scans} have no name in common: masks {shorten(sorted(masks))}; "
            f"scans {shorten(sorted(found))}"
        )
    failed = dict.fromkeys(sorted(masks.keys() - found.keys()), f"{scans} holds no scan of this name")
    for name in sorted(masks.keys() & found.keys()):
        try:
            _write(folder, found[name], masks[name], true.get(name), patient_data, max_voxels)
        except ResourceError:
            raise
        except LungkitError as error:
            failed[name] = str(error)
    return failed


def _write(
    folder: Path, source: ScanInput, mask: Path, label: Path | None, patient_data: bool, max_voxels: int
) -> None:
    name = source.name
    scan = source.load()
    known = _report(folder / "reports" / f"{name}.json")
    labels: dict[str, int] = {
        key: value for key, value in (known.get("labels") or {}).items() if isinstance(value, int)
    }
    reader = MaskReader(labels or {"background": 0, "foreground": 1})
    shown = [("prediction", reader.read_on(mask, scan.volumes[0]))]
    if label is not None:
        shown.append(("truth", reader.read_on(label, scan.volumes[0])))
    maps: list[tuple[str, str | None, Volume]] = []
    for class_name in labels:
        path = folder / "probabilities" / probability_name(name, class_name)
        if path.is_file():
            maps.append((f"probability of {class_name}", class_name, read_volume(path)))
    if (folder / "attention" / f"{name}.nii.gz").is_file():
        maps.append(("attention", None, read_volume(folder / "attention" / f"{name}.nii.gz")))
    models = [str(model.get("name", "")) for model in known.get("models") or ()]
    write_files_page(
        folder / PAGES / f"{name}.html",
        name,
        scan,
        shown,
        labels=labels or None,
        maps=maps,
        facts={"Model": ", ".join(models)} if models else None,
        index="../report.html",
        patient_data=patient_data,
        max_voxels=max_voxels,
    )


def _report(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
