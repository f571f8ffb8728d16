"""Where the results of a scan go, and writing them: each file whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lungkit
from lungkit._atomic import make_folder, write_json_atomic
from lungkit.checkpoint import sha256_of
from lungkit.data.geometry import orient, plan_geometry
from lungkit.data.nifti_names import split_suffix
from lungkit.data.preprocessing import WINDOW_PRESETS_HU
from lungkit.data.volume import write_nifti
from lungkit.errors import DataError, UsageError
from lungkit.inference import Prediction, Predictor
from lungkit.pipeline.inputs import LoadedScan, ScanInput
from lungkit.pipeline.measurements import measure_mask, separate_lesions
from lungkit.pipeline.scan_pages import write_prediction_page
from lungkit.report.html.summary_page import PAGES
from lungkit.report.mask_files import probability_name
from lungkit.report.pictures import optional_page, optional_picture

FORMATS = ("nifti", "dicom-seg", "rtstruct", "dicom-sr", "dicom-sc")

_WINDOW_SAMPLE = 1_000_000
_AIR_BELOW_HU = (
    -200
)  # no other unit of CT files goes so far below zero; HU of a body without air do not either
# Folder and ending of each format of DICOM; masks alone lie at the top, where lungkit-evaluate looks for them.
_DICOM_PLACE = {
    "dicom-seg": ("", "_seg.dcm"),
    "rtstruct": ("", "_rtstruct.dcm"),
    "dicom-sr": ("measurements", "_sr.dcm"),
    "dicom-sc": ("previews", "_preview.dcm"),
}
_MOST_LESIONS = 255
_DICOM_FILE = (".dcm", ".dicom")
# What people call files of masks, and nobody a folder.
_OTHER_FILES = (
    ".nrrd", ".nhdr", ".mha", ".mhd", ".img", ".hdr", ".mgz", ".gz", ".bz2", ".zip", ".npy", ".npz", ".png", ".jpg",
    ".jpeg", ".tif", ".tiff", ".json", ".csv", ".stl", ".vtk", ".h5",
)  # fmt: skip


@dataclass(frozen=True)
class OutputFiles:
    """Files of the results.

    In a folder: ``NAME.nii.gz`` (and ``NAME_seg.dcm``, ``NAME_rtstruct.dcm``), ``reports/NAME.json``,
    ``previews/NAME.png`` (and ``previews/NAME_preview.dcm``), ``measurements/NAME_sr.dcm`` with the SEG that it refers
    to, ``measurements/NAME_lesions.dcm``, ``probabilities/NAME_CLASS.nii.gz``, ``attention/NAME.nii.gz``; so that the
    folder can be given to ``lungkit-evaluate`` as it is. For a single scan ``path`` may be the mask's file (NIfTI, or
    ``.dcm`` for one format of DICOM): everything else then lies beside it under its name.
    """

    path: Path
    formats: tuple[str, ...] = ("nifti",)
    preview: bool = True
    page: bool = False
    """Whether every scan has a page for the browser."""
    patient_data: bool = False
    """Whether pages show what a DICOM header says of the patient."""

    @property
    def is_file(self) -> bool:
        """Whether ``path`` is the mask's file."""
        return bool(split_suffix(self.path.name)[1]) or self._is_dicom_file

    @property
    def _is_dicom_file(self) -> bool:
        return self.path.suffix.lower() in _DICOM_FILE and not self.path.is_dir()

    @property
    def folder(self) -> Path:
        """The folder of the masks."""
        return self.path.parent if self.is_file else self.path

    def mask(self, name: str, kind: str) -> Path:
        """File of the mask in one of :data:`FORMATS`."""
        if self._is_dicom_file or (self.is_file and kind == "nifti"):
            return self.path
        if kind == "nifti":
            return self.folder / f"{name}.nii.gz"
        folder, ending = _DICOM_PLACE[kind]
        return self._side(folder, name, ending)

    def lesions(self, name: str) -> Path:
        """File of the SEG that a structured report refers to."""
        return self._side(_DICOM_PLACE["dicom-sr"][0], name, "_lesions.dcm")

    def report(self, name: str) -> Path:
        """File of the report."""
        return self._side("reports", name, ".json")

    def table(self, name: str) -> Path:
        """File of the nodules that were pointed at."""
        return self._side("nodules", name, "_nodules.csv" if self.is_file else ".csv")

    def picture(self, name: str) -> Path:
        """File of the preview."""
        return self._side("previews", name, ".png")

    def page_file(self, name: str) -> Path:
        """File of the page for the browser."""
        return self._side(PAGES, name, ".html")

    def probability(self, name: str, class_name: str) -> Path:
        """File of the probabilities of a class."""
        return self.folder / "probabilities" / probability_name(self._stem(name), class_name)

    def attention(self, name: str) -> Path:
        """File of the attention map."""
        return self.folder / "attention" / f"{self._stem(name)}.nii.gz"

    def of(self, name: str, classes: Iterable[str] = (), *, attention: bool = False) -> list[Path]:
        """Every file of a scan, with the probabilities of ``classes`` (the first, the background, left out)."""
        return [
            *(self.mask(name, kind) for kind in self.formats),
            *([self.lesions(name)] if "dicom-sr" in self.formats else []),
            *(self.probability(name, class_name) for class_name in [*classes][1:]),
            *([self.attention(name)] if attention else []),
            *([self.picture(name)] if self.preview else []),
            *([self.page_file(name)] if self.page else []),
            self.report(name),
        ]

    def check(self) -> None:
        """Refuse a path that looks like a file of another format.

        Raises:
            UsageError: says which names masks have.
        """
        if self._is_dicom_file and (len(self.formats) > 1 or "nifti" in self.formats):
            raise UsageError(
                f"--output {self.path} holds no --format {' '.join(self.formats)}; ask for one "
                "format of DICOM alone, or name a .nii.gz file or a folder"
            )
        suffix = self.path.suffix.lower()
        if not self.is_file and suffix in _OTHER_FILES and not self.path.is_dir():
            raise UsageError(
                f"--output {self.path}: masks are not written as {suffix}; name a .nii or .nii.gz file, a .dcm "
                "file with one --format of DICOM, or a folder"
            )

    def _side(self, folder: str, name: str, suffix: str) -> Path:
        if self.is_file:
            return self.path.with_name(self._stem(name) + suffix)
        return self.folder / folder / f"{name}{suffix}"

    def _stem(self, name: str) -> str:
        if not self.is_file:
            return name
        return self.path.stem if self._is_dicom_file else split_suffix(self.path.name)[0]


def check_formats(formats: Sequence[str], scans: Sequence[ScanInput]) -> None:
    """Refuse DICOM out for scans that are not DICOM.

    Raises:
        UsageError: names the format and the scan.
    """
    wanted = [kind for kind in formats if kind != "nifti"]
    if not wanted:
        return
    for scan in scans:
        if not scan.is_dicom:
            raise UsageError(
                f"--format {wanted[0]} refers to the images of a DICOM series, but {scan.paths[0]} is NIfTI; "
                "use --format nifti, or give the series"
            )


def write_results(
    files: OutputFiles, source: ScanInput, scan: LoadedScan, prediction: Prediction, predictor: Predictor
) -> dict[str, Any]:
    """Write everything that was asked for; the report comes last, so that one that is there speaks of whole files.

    Returns:
        The report.

    Raises:
        ResourceError: the disk is full; no file is half written.
        UsageError: a folder cannot be written.
    """
    name = source.name
    written: list[Path] = []
    for kind in files.formats:
        path = files.mask(name, kind)
        make_folder(path.parent)
        if kind == "dicom-sc":
            continue  # below: it shows what the report says
        if kind == "dicom-sr":
            written += _write_measurements(path, files.lesions(name), scan, prediction, predictor)
            continue
        _write_mask(path, kind, scan, prediction, predictor)
        written.append(path)
    for class_name, map_ in prediction.probabilities.items():
        written.append(files.probability(name, class_name))
        make_folder(written[-1].parent)
        write_nifti(written[-1], map_, prediction.affine, space=prediction.space)
    if prediction.attention is not None:
        written.append(files.attention(name))
        make_folder(written[-1].parent)
        write_nifti(written[-1], prediction.attention, prediction.affine, space=prediction.space)
    report = _report(name, scan, prediction, predictor)
    if files.preview:
        picture = files.picture(name)
        with optional_picture(picture):
            make_folder(picture.parent)
            _draw(picture, name, scan, prediction, report["classes"])
            written.append(picture)
    if "dicom-sc" in files.formats:
        written.append(files.mask(name, "dicom-sc"))
        _write_capture(written[-1], scan, prediction, report["classes"])
    if files.page:
        with optional_page(files.page_file(name)):
            write_prediction_page(
                files.page_file(name),
                name,
                scan,
                prediction,
                predictor,
                index=None if files.is_file else "../report.html",
                patient_data=files.patient_data,
            )
    report["files"] = {str(path.relative_to(files.folder)): sha256_of(path) for path in written}
    make_folder(files.report(name).parent)
    write_json_atomic(files.report(name), report)
    return report


def _report(name: str, scan: LoadedScan, prediction: Prediction, predictor: Predictor) -> dict[str, Any]:
    first = scan.volumes[0]
    return {
        "scan": name,
        "classes": measure_mask(
            prediction.mask,
            prediction.affine,
            prediction.labels,
            image=first.array,
            regions=predictor.models[0].regions,
        ),
        "shape_xyz": list(first.array.shape),
        "spacing_xyz_mm": [round(size, 6) for size in first.spacing_mm],
        "labels": prediction.labels,
        "models": [model.to_dict() for model in predictor.models],
        "postprocessing": predictor.postprocessing.to_dict(),
        "mirrored": predictor.mirror,
        "overlap": predictor.overlap,
        "device": prediction.device,
        "precision": prediction.precision,
        "seconds": round(prediction.seconds, 3),
        "warnings": list(prediction.warnings),
        "lungkit": lungkit.__version__,
        "note": "Made by a research tool, not a medical device; centroid_lps_mm are DICOM patient coordinates.",
    }


def _write_mask(
    path: Path, kind: str, scan: LoadedScan, prediction: Prediction, predictor: Predictor
) -> None:
    if kind == "nifti":
        prediction.save(path)
        return
    if scan.dicom is None:
        raise DataError(f"{path}: {kind} refers to a DICOM series, and this scan came from none")
    from lungkit.data import dicom

    labels = {name: value for name, value in prediction.labels.items() if value != 0}
    if kind == "rtstruct":
        dicom.write_rtstruct(path, scan.dicom, prediction.mask, labels)
    else:
        dicom.write_dicom_seg(path, scan.dicom, prediction.mask, labels, algorithm=predictor.models[0].name)


def _write_measurements(
    path: Path, beside: Path, scan: LoadedScan, prediction: Prediction, predictor: Predictor
) -> list[Path]:
    """A structured report, and the SEG that it refers to, a segment a lesion; no SEG where there is no lesion."""
    from lungkit.data import dicom

    if scan.dicom is None:
        raise DataError(f"{path}: dicom-sr refers to a DICOM series, and this scan came from none")
    numbers, found = separate_lesions(
        prediction.mask, prediction.affine, prediction.labels, scan.volumes[0].array, most=_MOST_LESIONS
    )
    places: dict[str, int] = {}
    names = []
    for label, _ in found:
        places[label] = places.get(label, 0) + 1
        names.append(f"{label[:58]} {places[label]}")
    algorithm = predictor.models[0].name
    if found:
        segments = {name: number for number, name in enumerate(names, start=1)}
        description = "lungkit lesions"
        dicom.write_dicom_seg(
            beside,
            scan.dicom,
            numbers,
            segments,
            algorithm=algorithm,
            series_description=description,
            series_number=304,
        )
    lesions = [
        dicom.LesionMeasures(
            lesion["volume_ml"],
            lesion["longest_diameter_mm"],
            lesion["short_diameter_mm"],
            lesion["mean_intensity"],
        )
        for _, lesion in found
    ]
    dicom.write_measurement_report(path, scan.dicom, beside if found else None, lesions, algorithm=algorithm)
    return [path, beside] if found else [path]


def _write_capture(path: Path, scan: LoadedScan, prediction: Prediction, found: dict[str, Any]) -> None:
    """The preview as a DICOM image, without the name of the scan, which may be the patient's."""
    from matplotlib.image import imread

    from lungkit.data import dicom

    if scan.dicom is None:
        raise DataError(f"{path}: dicom-sc refers to a DICOM series, and this scan came from none")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "preview.png"
        _draw(picture, "", scan, prediction, found)
        pixels = np.rint(imread(picture)[..., :3] * 255).astype(np.uint8)
    dicom.write_secondary_capture(path, scan.dicom, pixels)


def _draw(path: Path, name: str, scan: LoadedScan, prediction: Prediction, found: dict[str, Any]) -> None:
    from lungkit.report import save_preview

    first = scan.volumes[0]
    geometry = plan_geometry(first)
    legend = {
        prediction.labels[label]: (
            f"{label}: {entry['volume_ml']:.2f} ml, longest diameter {entry['longest_diameter_mm']:.1f} mm"
        )
        for label, entry in found.items()
    }
    save_preview(
        path,
        orient(first.array, geometry),
        orient(np.asarray(prediction.mask), geometry),
        geometry.spacing_mm,
        window=_window(first.array),
        title=name,
        legend=legend,
    )


def _window(scan: np.ndarray) -> tuple[float, float]:
    """Grey values to show, by the scan's own units, whatever the model was trained on: lung in HU, else nearly all."""
    sample = scan.reshape(-1)[:: max(1, scan.size // _WINDOW_SAMPLE)]
    low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5)))
    if low < _AIR_BELOW_HU:
        return WINDOW_PRESETS_HU["lung"]
    return low, max(high, low + 1e-3)
