"""From DICOM folders, CT with RTSTRUCT or SEG, to a dataset that lungkit and nnU-Net train on."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lungkit._atomic import check_new, new_folder, write_json_atomic
from lungkit.data.dicom.archive import Archive, FoundMask, FoundSeries, find_archive
from lungkit.data.dicom.read_label import StructureRule, add_structures
from lungkit.data.dicom.series import read_found_series
from lungkit.data.volume import DEFAULT_MAX_VOXELS, write_nifti
from lungkit.errors import DataError, LungkitError, ResourceError, shorten

_LOG = logging.getLogger("lungkit")

KINDS = ("rtstruct", "seg")


@dataclass(frozen=True)
class ImportedCase:
    """A case of the new dataset, and what it was made from; the paths may name a patient."""

    case_id: str
    series: Path
    masks: tuple[Path, ...]
    volume_ml: dict[str, float]


@dataclass
class Import:
    """What became of the objects that were found: cases, series without a mask, and what could not be used."""

    cases: list[ImportedCase] = field(default_factory=list)
    unlabelled: dict[Path, str] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)


def import_dicom(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rules: Sequence[StructureRule] = (),
    kinds: Sequence[str] = KINDS,
    unite: bool = False,
    name_patients: bool = False,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    progress: Callable[[int, int], None] | None = None,
) -> Import:
    """Write a dataset in the nnU-Net raw layout from the CT series below ``source`` and the masks made on them.

    Cases are called ``p001-ct1``, by patient and series, and nothing that is written tells who the patient is;
    ``dataset.json`` says under ``patients`` which cases belong together, so that no fold divides a patient. A series
    that cannot be used is named in the result, and the others go on. The dataset is there whole or not at all.

    Args:
        source: folder, looked through at any depth.
        output: a new folder.
        rules: which structures are which class, the classes being numbered in this order from 1. None: the one
            structure that all masks hold under one name.
        kinds: masks to take, "rtstruct" and "seg".
        unite: put the masks of a series together where there are several that hold a structure; else it is refused.
        name_patients: call cases after the patient ID.
        max_voxels: refuse larger series.
        progress: called with the series that are done, and how many there are.

    Returns:
        The cases, and what was passed over, with reasons.

    Raises:
        DataError: no CT series with a mask can be used; several structures and no rules.
        UsageError: ``output`` exists, or pydicom is not installed.
        ResourceError: the disk is full; nothing is left behind.
    """
    source, output = Path(source), Path(output)
    check_new(output)
    archive = find_archive(source)
    result = Import(failed=dict(archive.problems), others=archive.others)
    masks = _masks_by_series(archive, kinds, result)
    rules = tuple(rules) or _only_structure(source, archive, masks)
    labels = {"background": 0}
    for rule in rules:
        labels.setdefault(rule.label, len(labels))
    ids = _case_ids([found for found in archive.series if found.info.uid in masks], name_patients)
    patients: dict[str, str] = {}
    with new_folder([output]) as new:
        temporary = new.path
        for folder in ("imagesTr", "labelsTr"):
            (temporary / folder).mkdir()
        for done, found in enumerate(archive.series):
            if progress is not None:
                progress(done, len(archive.series))
            chosen = _choose_masks(found, masks.get(found.info.uid, []), rules, unite, result)
            if chosen:
                case_id = ids[found.info.uid]
                try:
                    case = _write_case(temporary, case_id, found, chosen, rules, labels, max_voxels)
                except ResourceError:
                    raise
                except LungkitError as error:
                    result.failed[found.folder] = str(error)
                    continue
                result.cases.append(case)
                patients[case_id] = case_id.rpartition("-")[0]
                _LOG.info("%s: %s", case_id, ", ".join(f"{k} {v:.2f} ml" for k, v in case.volume_ml.items()))
        if not result.cases:
            reasons = [f"{path}: {why}" for path, why in {**result.failed, **result.unlabelled}.items()]
            raise DataError(
                f"{source}: no CT series with a mask that can be used ({len(archive.series)} series, "
                f"{len(archive.masks)} masks found){': ' if reasons else ''}{'; '.join(reasons[:3])}"
            )
        content = {
            "channel_names": {"0": "CT"},
            "labels": labels,
            "numTraining": len(result.cases),
            "file_ending": ".nii.gz",
            "name": output.absolute().name,
            "patients": patients,
        }
        write_json_atomic(temporary / "dataset.json", content)
    return result


def _masks_by_series(archive: Archive, kinds: Sequence[str], result: Import) -> dict[str, list[FoundMask]]:
    masks: dict[str, list[FoundMask]] = {}
    for mask in archive.masks:
        if mask.kind not in kinds:
            result.others[f"masks of kind {mask.kind}"] += 1
            continue
        series = archive.series_of(mask)
        if len(series) == 1:
            masks.setdefault(series[0].info.uid, []).append(mask)
        elif series:
            result.failed[mask.path] = (
                f"may belong to any of {len(series)} series, and names none or several of them"
            )
        else:
            result.failed[mask.path] = "the CT series that it was made on is not there, or cannot be used"
    return masks


def _only_structure(
    source: Path, archive: Archive, masks: dict[str, list[FoundMask]]
) -> tuple[StructureRule, ...]:
    names = Counter(name for found in masks.values() for mask in found for name in mask.structures)
    if len(names) > 1:
        listed = shorten((f"{name!r} ({count})" for name, count in names.most_common()), limit=20)
        raise DataError(
            f"{source}: the masks hold several structures: {listed}; say which are the tumour, e.g. "
            "--roi 'GTV.*=tumour'"
        )
    return tuple(
        StructureRule(re.compile(re.escape(name.strip()), re.IGNORECASE), name.strip()) for name in names
    )


def _case_ids(series: Sequence[FoundSeries], name_patients: bool) -> dict[str, str]:
    """Case id by series UID: patient and series, without an ending that looks like a channel number."""
    members: dict[str, list[FoundSeries]] = {}
    for found in series:
        members.setdefault(found.patient, []).append(found)
    digits = max(3, len(str(len(members))))
    ids: dict[str, str] = {}
    taken: set[str] = set()
    for number, (patient, own) in enumerate(members.items(), start=1):
        name = f"p{number:0{digits}d}"
        if name_patients:
            known = re.sub(r"[^A-Za-z0-9]+", "-", patient.split("\0")[0]).strip("-") or name
            name = known if known.lower() not in taken else f"{known}-{number}"
            taken.add(name.lower())
        for index, found in enumerate(own, start=1):
            ids[found.info.uid] = f"{name}-ct{index}"
    return ids


def _choose_masks(
    found: FoundSeries,
    masks: Sequence[FoundMask],
    rules: Sequence[StructureRule],
    unite: bool,
    result: Import,
) -> list[FoundMask]:
    wanted = [mask for mask in masks if any(rule.fits(name) for rule in rules for name in mask.structures)]
    if wanted and (unite or len(wanted) == 1):
        return wanted
    if wanted:
        result.failed[found.folder] = (
            f"{len(wanted)} masks hold a structure that is wanted ({shorten(mask.path.name for mask in wanted)}); "
            "choose by --masks or --roi, or put them together with --unite"
        )
    elif masks:
        names = dict.fromkeys(name for mask in masks for name in mask.structures)
        result.unlabelled[found.folder] = (
            f"no structure that is wanted; its masks hold {shorten(map(repr, names))}"
        )
    else:
        result.unlabelled[found.folder] = "no mask was made on it"
    return []


def _write_case(
    root: Path,
    case_id: str,
    found: FoundSeries,
    masks: Sequence[FoundMask],
    rules: Sequence[StructureRule],
    values: dict[str, int],
    max_voxels: int,
) -> ImportedCase:
    scan = read_found_series(found.info, max_voxels=max_voxels)
    labels: np.ndarray = np.zeros(scan.volume.array.shape, np.uint8, order="F")
    for mask in masks:
        add_structures(labels, mask.path, scan, mask.structures, rules, values)
    voxel_ml = float(abs(np.linalg.det(scan.volume.affine[:3, :3]))) / 1000
    counts = np.bincount(labels.ravel(order="K"), minlength=len(values))
    if not counts[1:].any():
        raise DataError("the structures that are wanted hold no voxel")
    write_nifti(root / "imagesTr" / f"{case_id}_0000.nii.gz", scan.volume.array, scan.volume.affine)
    write_nifti(root / "labelsTr" / f"{case_id}.nii.gz", labels, scan.volume.affine)
    volumes = {name: float(counts[value]) * voxel_ml for name, value in values.items() if value}
    return ImportedCase(case_id, found.folder, tuple(mask.path for mask in masks), volumes)
