"""``lungkit-import``: a dataset to train on from what hospitals and archives hold; models of nnU-Net."""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lungkit
from lungkit._terminal import progress_bars
from lungkit._text import csv_cell
from lungkit.cli._common import run_command
from lungkit.cli._parser import CommandParser
from lungkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from lungkit.data.dicom.import_dataset import Import

_LOG = logging.getLogger("lungkit")

_EPILOG = """
SRC, a folder or a zip, is looked through at any depth (PATIENT/STUDY/SERIES) for CT series and for the RTSTRUCT and SEG
objects made on them. DATASET gets imagesTr/, labelsTr/ and dataset.json (nnU-Net raw) with cases p001-ct1 and so on:
no name, no date, no UID. lungkit-train keeps the cases of a patient in one fold.
Examples:
  lungkit-import dicom archive/ -o DATASET --roi 'GTV.*=tumour'
  lungkit-import dicom archive/ -o DATASET --roi 'GTV.*=tumour' --roi 'lung.*=lung' --masks rtstruct
  lungkit-train --data DATASET
Where classes overlap, the one that comes first stays. Exit codes: 0 ok, 2 usage, 3 bad data: something could not be
used; it is named, and the rest is written.
"""

_NNUNET_EPILOG = """
MODEL holds plans.json, dataset.json and fold_*/checkpoint_final.pth. Nothing in them is executed. RUN predicts as
nnU-Net does, mirror images included (lungkit-predict --no-tta leaves them out); several folds are an ensemble. What
cannot be imported is named: cascades, other architectures than PlainConvUNet and ResidualEncoderUNet, normalisations
of your own.
Examples:
  lungkit-import nnunet results/Dataset001_X/nnUNetTrainer__nnUNetPlans__3d_fullres -o runs/imported
  lungkit-predict -i scan.nii.gz -o mask.nii.gz --model runs/imported
Exit codes: 0 ok, 2 usage, 4 the model is damaged or cannot be imported, 5 disk full.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(lambda: _run(_parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    return _import_nnunet(options) if options.kind == "nnunet" else _import_dicom(options)


def _parser() -> argparse.ArgumentParser:
    from lungkit.data.volume import DEFAULT_MAX_VOXELS

    parser = CommandParser(
        prog="lungkit-import", description="Make a dataset to train on, or a run of a model of nnU-Net."
    )
    parser.add_argument("--version", action="version", version=lungkit.__version__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_nnunet(kinds)
    dicom = kinds.add_parser(
        "dicom",
        help="CT series with RTSTRUCT or SEG",
        description="Make a dataset to train on from DICOM: CT series with RTSTRUCT or SEG.",
        epilog=_EPILOG,
    )
    add = dicom.add_argument
    add("source", type=Path, metavar="SRC", help="folder of DICOM files, at any depth, or a .zip")
    add("-o", "--output", type=Path, required=True, metavar="DATASET", help="new folder for the dataset")
    add(
        "--roi",
        action="append",
        default=[],
        metavar="REGEX=LABEL",
        help="structures whose whole name fits, in any case, are of this class; repeatable "
        "(default: the one name that all masks share)",
    )
    add(
        "--masks",
        nargs="+",
        default=["rtstruct", "seg"],
        choices=("rtstruct", "seg"),
        help="which to take (default: both)",
    )
    add("--unite", action="store_true", help="put several masks of one series together (default: refuse it)")
    add(
        "--patient-ids",
        action="store_true",
        help="call cases after the patient ID (default: p001, p002, ...)",
    )
    add(
        "--report",
        type=Path,
        metavar="FILE.csv",
        help="new file that says which folder became which case: it names patients where the folders do",
    )
    add("--max-voxels", type=int, default=DEFAULT_MAX_VOXELS, metavar="N", help="refuse larger series")
    add("--json", action="store_true", help="print what became of the series as JSON on standard output")
    return parser


def _add_nnunet(kinds: argparse._SubParsersAction[CommandParser]) -> None:
    nnunet = kinds.add_parser(
        "nnunet",
        help="a trained model of nnU-Net 2",
        description="Make a run that lungkit-predict predicts with from a trained model of nnU-Net 2.",
        epilog=_NNUNET_EPILOG,
    )
    add = nnunet.add_argument
    add("source", type=Path, metavar="MODEL", help="TRAINER__PLANS__CONFIGURATION of nnU-Net's results")
    add("-o", "--output", type=Path, required=True, metavar="RUN", help="new run folder")
    add("--folds", nargs="+", metavar="N", help="of them, or all (default: every fold there is)")
    add("--checkpoint", choices=("final", "best"), default="final", help="of each fold (default: final)")
    add("--json", action="store_true", help="print what was imported as JSON on standard output")


def _import_nnunet(options: argparse.Namespace) -> int:
    from lungkit.interop import import_nnunet

    result = import_nnunet(options.source, options.output, folds=options.folds, checkpoint=options.checkpoint)
    _LOG.info(
        "%s of %s, %s; predict with: lungkit-predict -i SCAN -o MASK --model %s",
        result.configuration,
        result.trainer,
        ", ".join(result.folds),
        result.run,
    )
    if options.json:
        content = {
            "run": str(result.run),
            "folds": list(result.folds),
            "configuration": result.configuration,
            "trainer": result.trainer,
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    return 0


def _import_dicom(options: argparse.Namespace) -> int:
    from lungkit._atomic import write_text_atomic
    from lungkit.data.dicom.import_dataset import import_dicom
    from lungkit.data.dicom.read_label import StructureRule
    from lungkit.data.zip_archive import unpacked

    if options.report is not None and options.report.exists():
        raise UsageError(f"--report {options.report} exists; name a new file")
    with unpacked(options.source) as source, progress_bars() as bars:
        task = bars.add_task("series", total=None)
        result = import_dicom(
            source,
            options.output,
            rules=[StructureRule.parse(text) for text in options.roi],
            kinds=options.masks,
            unite=options.unite,
            name_patients=options.patient_ids,
            max_voxels=options.max_voxels,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    for what, count in sorted(result.others.items()):
        _LOG.info("passed over: %d %s", count, what)
    for path, reason in result.unlabelled.items():
        _LOG.warning("passed over: %s: %s", path, reason)
    for path, reason in result.failed.items():
        _LOG.error("not used: %s: %s", path, reason)
    if options.report is not None:
        write_text_atomic(options.report, _table(result))
    _LOG.info(
        "%d cases in %s; train with: lungkit-train --data %s",
        len(result.cases),
        options.output,
        options.output,
    )
    if options.json:
        content = {
            "dataset": str(options.output),
            "cases": {case.case_id: case.volume_ml for case in result.cases},
            "unlabelled": {str(path): reason for path, reason in result.unlabelled.items()},
            "failed": {str(path): reason for path, reason in result.failed.items()},
            "others": dict(result.others),
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    return DataError.exit_code if result.failed else 0


def _table(result: Import) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "folder", "masks", "note"])
    for case in result.cases:
        writer.writerow(
            [*map(csv_cell, (case.case_id, str(case.series), "; ".join(map(str, case.masks)))), ""]
        )
    for path, reason in {**result.unlabelled, **result.failed}.items():
        writer.writerow(["", csv_cell(str(path)), "", csv_cell(reason)])
    return text.getvalue()
