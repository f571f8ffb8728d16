"""The nodule stacks of the headline table, from the public files of LIDC-IDRI.

``python benchmarks/lidc_nodules.py TCIA -o lidc_nodules``: TCIA is the folder of LIDC-IDRI as The Cancer Imaging
Archive gives it (https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0): CT series as DICOM and, in their folders
or anywhere below, the readers' annotations as XML. Nothing is downloaded. The result is a dataset in nnU-Net layout:

- one stack a nodule of 3 mm or more, ``PATIENT_nNN``: the slices in which at least two readers marked a voxel; where
  these have gaps, one stack a run, ``PATIENT_nNNrR``;
- 128 x 128 pixels, native, round the middle of what any reader marked, shifted to stay in the scan;
- ``imagesTr`` 8-bit, each slice scaled from its smallest to its largest value; ``votesTr`` readers a voxel;
  ``labelsTr`` at least two readers; five folds by patient.

Outlines are drawn on the first pixels outside of a nodule (Armato et al., "The Lung Image Database Consortium", 2011),
so theirs are not marked unless ``--with-outline`` says so. Marks of several readers are one nodule where they touch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from lungkit.cli._common import run_command
from lungkit.data import make_or_load_splits, open_dataset, read_series, write_nifti
from lungkit.data.dicom.contours import fill_polygons
from lungkit.data.dicom.series import DicomScan
from lungkit.errors import DataError, UsageError

SIZE = 128
_AGREEMENT = 2
_READERS = 4


@dataclass(frozen=True)
class Outline:
    """One polygon in the image ``slice_uid``: ``points`` (N, 2) of columns and rows; a hole where not ``included``."""

    slice_uid: str
    points: np.ndarray
    included: bool


@dataclass(frozen=True)
class Annotation:
    """What one of the readers outlined as one nodule."""

    reader: int
    outlines: tuple[Outline, ...]


@dataclass
class Nodule:
    """Marks that touch: the readers' pixels (rows, columns) of each slice."""

    marks: list[tuple[int, dict[int, np.ndarray]]] = field(default_factory=list)

    def votes(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Readers a voxel, uint8 (Z, Y, X)."""
        total = np.zeros(shape, np.uint8)
        for reader in {reader for reader, _ in self.marks}:
            marked = np.zeros(shape, bool)
            for other, slices in self.marks:
                for index, mask in slices.items() if other == reader else ():
                    marked[index] |= mask
            total += marked
        return total


def read_annotations(path: Path) -> tuple[str, list[Annotation]]:
    """The series that a file of annotations is about, and the nodules of 3 mm or more in it.

    Smaller ones have a single point in place of an outline. A file of another kind is about no series, "".

    Raises:
        DataError: it is damaged.
    """
    try:
        root = ElementTree.parse(path).getroot()
        if _tag(root) != "LidcReadMessage":
            return "", []
        uid = next((_text(node) for node in root.iter() if _tag(node) == "SeriesInstanceUid"), "")
        sessions = [node for node in root if _tag(node) == "readingSession"]
        found = []
        for reader, session in enumerate(sessions):
            for nodule in (node for node in session if _tag(node) == "unblindedReadNodule"):
                outlines = tuple(_outline(node) for node in nodule if _tag(node) == "roi")
                if any(len(outline.points) > 1 for outline in outlines):
                    found.append(Annotation(reader, outlines))
    except (ElementTree.ParseError, ValueError, StopIteration, OSError) as error:
        raise DataError(f"{path}: not readable as annotations of LIDC-IDRI ({error!r})") from error
    return uid, found


def find_nodules(scan: DicomScan, annotations: Sequence[Annotation], *, with_outline: bool) -> list[Nodule]:
    """The nodules of a scan, in order of their first slice, row and column.

    Raises:
        DataError: an outline lies in an image that the series lacks.
    """
    columns, rows, _ = scan.volume.array.shape
    place = {str(header.SOPInstanceUID): index for index, header in enumerate(scan.headers)}
    nodules: list[Nodule] = []
    for annotation in annotations:
        slices: dict[int, np.ndarray] = {}
        for outline in sorted(annotation.outlines, key=lambda outline: not outline.included):
            if outline.slice_uid not in place:
                raise DataError(
                    f"{scan.volume.path}: the image {outline.slice_uid}, which is annotated, is missing"
                )
            mask = _filled(outline.points, (rows, columns), with_outline=with_outline == outline.included)
            own = slices.setdefault(place[outline.slice_uid], np.zeros((rows, columns), bool))
            own[mask] = outline.included
        touched = [nodule for nodule in nodules if any(_touch(slices, other) for _, other in nodule.marks)]
        merged = Nodule([mark for nodule in touched for mark in nodule.marks] + [(annotation.reader, slices)])
        nodules = [nodule for nodule in nodules if nodule not in touched] + [merged]
    return sorted(nodules, key=_first_voxel)


def stacks(scan: DicomScan, nodule: Nodule) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Suffix, 8-bit image and votes, both (X, Y, slices), of every run of slices that readers agree on.

    Raises:
        DataError: the slices are smaller than the crop.
    """
    columns, rows, depth = scan.volume.array.shape
    if min(columns, rows) < SIZE:
        raise DataError(f"{scan.volume.path}: {columns} x {rows} pixels, smaller than the crop of {SIZE}")
    votes = nodule.votes((depth, rows, columns))
    marked = np.argwhere(votes.any(axis=0))
    middle = (marked.min(axis=0) + marked.max(axis=0)) // 2
    top, left = (
        int(np.clip(at - SIZE // 2, 0, size - SIZE)) for at, size in zip(middle, (rows, columns), strict=True)
    )
    inside = (slice(left, left + SIZE), slice(top, top + SIZE))
    agreed = np.flatnonzero((votes >= _AGREEMENT).any(axis=(1, 2)))
    runs = np.split(agreed, np.flatnonzero(np.diff(agreed) > 1) + 1) if agreed.size else []
    for number, run in enumerate(runs):
        image = np.asarray(scan.volume.array[inside][..., run], np.float64)
        low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
        scaled = np.rint(255 * (image - low) / np.maximum(high - low, 1)).astype(np.uint8)
        yield f"r{number}" if len(runs) > 1 else "", scaled, votes[run].transpose(2, 1, 0)[inside]


def build(
    source: Path, target: Path, *, patients: Iterable[str] | None = None, with_outline: bool = False
) -> int:
    """Write the dataset; returns the number of stacks.

    Raises:
        UsageError: ``target`` exists.
        DataError: a file is damaged, or nothing was found.
    """
    if target.exists():
        raise UsageError(f"{target} exists; name another folder")
    wanted = None if patients is None else set(patients)
    by_series: dict[str, list[Annotation]] = {}
    for path in sorted(source.rglob("*.xml")):
        uid, annotations = read_annotations(path)
        if uid:
            by_series[uid] = annotations
    folders = [target / name for name in ("imagesTr", "labelsTr", "votesTr")]
    for folder in folders:
        folder.mkdir(parents=True)
    nodules_of: dict[str, int] = {}
    written = 0
    for patient, uid, folder in _annotated_series(source, set(by_series)):
        if wanted is not None and patient not in wanted:
            continue
        scan = read_series(folder, series=uid)
        z, y, x = _spacing(scan)
        for nodule in find_nodules(scan, by_series[uid], with_outline=with_outline):
            number = nodules_of.setdefault(patient, 0)
            nodules_of[patient] += 1
            for suffix, image, votes in stacks(scan, nodule):
                name = f"{patient}_n{number:02d}{suffix}"
                files = (f"{name}_0000.nii.gz", f"{name}.nii.gz", f"{name}.nii.gz")
                arrays = (image, (votes >= _AGREEMENT).astype(np.uint8), votes)
                for into, file, array in zip(folders, files, arrays, strict=True):
                    write_nifti(into / file, array, np.diag([-x, -y, z, 1.0]))
                written += 1
    if not written:
        raise DataError(f"{source}: no CT series with annotations that two readers agree on")
    _describe(target, written)
    return written


def _describe(target: Path, stacks_written: int) -> None:
    content = {
        "name": "LIDC nodule stacks",
        "description": f"{SIZE} x {SIZE} crops of LIDC-IDRI (CC BY 3.0) round nodules; votesTr: readers a voxel",
        "channel_names": {"0": "CT (8-bit, min-max per slice)"},
        "labels": {"background": 0, "tumour": 1},
        "readers": _READERS,
        "numTraining": stacks_written,
        "file_ending": ".nii.gz",
    }
    (target / "dataset.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    dataset = open_dataset(target)
    patients = {case.case_id.split("_n")[0] for case in dataset.cases}
    if len(patients) >= 5:
        splits = make_or_load_splits(dataset, folds=5, seed=0, patient_pattern=r"^(.+)_n\d+(?:r\d+)?$")
        folds = [{"train": list(split.train), "val": list(split.val)} for split in splits]
        (target / "splits_final.json").write_text(json.dumps(folds, indent=1) + "\n", encoding="utf-8")


def _annotated_series(source: Path, wanted: set[str]) -> Iterator[tuple[str, str, Path]]:
    """Patient, series and folder of every CT that is annotated, by the first file of each folder."""
    import pydicom

    for folder in sorted({path.parent for path in source.rglob("*.dcm")}):
        header = pydicom.dcmread(min(folder.glob("*.dcm")), stop_before_pixels=True)
        if str(header.get("SeriesInstanceUID")) in wanted and header.get("Modality") == "CT":
            yield str(header.PatientID), str(header.SeriesInstanceUID), folder


def _spacing(scan: DicomScan) -> tuple[float, float, float]:
    x, y, z = np.linalg.norm(np.asarray(scan.volume.affine)[:3, :3], axis=0)
    return float(z), float(y), float(x)


def _filled(points: np.ndarray, shape: tuple[int, int], *, with_outline: bool) -> np.ndarray:
    outline = np.zeros(shape, bool)
    for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
        # Edge maps name every pixel in turn; where they leave some out, those on the way count too.
        steps = max(1, int(np.abs(end - start).max()))
        x, y = np.rint(start + np.linspace(0, 1, steps + 1)[:, None] * (end - start)).astype(int).T
        seen = (x >= 0) & (y >= 0) & (x < shape[1]) & (y < shape[0])
        outline[y[seen], x[seen]] = True
    filled = fill_polygons([points.astype(float)], shape)
    return filled | outline if with_outline else filled & ~outline


def _touch(first: dict[int, np.ndarray], second: dict[int, np.ndarray]) -> bool:
    near = [(first[at], second[at + step]) for at in first for step in (-1, 0, 1) if at + step in second]
    return any((one & other).any() for one, other in near)


def _first_voxel(nodule: Nodule) -> tuple[int, int, int]:
    marked = [
        (at, *np.argwhere(mask)[0].tolist())
        for _, slices in nodule.marks
        for at, mask in slices.items()
        if mask.any()
    ]
    return min(marked, default=(sys.maxsize, 0, 0))


def _outline(roi: ElementTree.Element) -> Outline:
    told = {_tag(node): _text(node) for node in roi}
    points = [
        [int(_text(part)) for wanted in ("xCoord", "yCoord") for part in node if _tag(part) == wanted]
        for node in roi
        if _tag(node) == "edgeMap"
    ]
    return Outline(
        told["imageSOP_UID"], np.array(points).reshape(-1, 2), told.get("inclusion", "TRUE").upper() == "TRUE"
    )


def _tag(node: ElementTree.Element) -> str:
    return node.tag.rpartition("}")[2]


def _text(node: ElementTree.Element) -> str:
    return (node.text or "").strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the LIDC nodule stacks from the files of TCIA.")
    parser.add_argument("source", type=Path, metavar="TCIA", help="folder of LIDC-IDRI: DICOM and XML")
    parser.add_argument("-o", dest="target", type=Path, required=True, metavar="DATASET", help="is made")
    parser.add_argument("--patients", type=Path, metavar="FILE", help="use these only, a line each")
    parser.add_argument("--with-outline", action="store_true", help="count the readers' outlines as nodule")
    options = parser.parse_args(arguments)

    def run() -> int:
        patients = None if options.patients is None else options.patients.read_text(encoding="utf-8").split()
        count = build(options.source, options.target, patients=patients, with_outline=options.with_outline)
        sys.stdout.write(f"{count} stacks in {options.target}\n")
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
