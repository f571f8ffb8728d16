"""``lungkit-report``: pages for the browser of results, scans and masks that are there already."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import lungkit
from lungkit.cli._common import run_command
from lungkit.cli._parser import CommandParser
from lungkit.errors import DataError, UsageError

_LOG = logging.getLogger("lungkit")

_EPILOG = """
A folder of lungkit-predict, -evaluate, -train or -compare gets report.html from the files that are in it, and with
--scans a page with a viewer for every scan of predictions. A scan with --mask gets a page of its own. Pages are single
files that need neither a network nor a server; what a DICOM header says of the patient stays out of them.
Examples:
  lungkit-report runs/NAME                               a training run
  lungkit-report masks/ --scans scans/                   predictions, with a page of each scan
  lungkit-report masks/ --scans scans/ --labels labelsTr/        beside the true masks
  lungkit-report scan.nii.gz --mask prediction=a.nii.gz --mask truth=b.nii.gz -o case.html
  lungkit-report series/ --mask "reader 1=a.nii.gz" --mask "reader 2=b.nii.gz" --map probability=p.nii.gz
Exit codes: 0 ok, 2 usage, 3 bad data: no results, or a file that cannot be used; the other scans have their pages.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    from lungkit.report.html.volumes import MAX_VOXELS

    parser = CommandParser(
        prog="lungkit-report",
        description="Write pages with a viewer, tables and charts for the browser.",
        epilog=_EPILOG,
    )
    parser.add_argument("path", type=Path, help="folder of results, or a scan (NIfTI file, DICOM series)")
    parser.add_argument("--scans", type=Path, metavar="DIR", help="the scans that masks were predicted of")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="true masks of the same names")
    parser.add_argument(
        "--mask",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help='a mask of the scan, repeatable; "truth" is drawn dashed, other names can be compared',
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="values from 0 to 1 over the scan, such as probabilities, repeatable",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="page of a scan (default: its name with .html, here)",
    )
    parser.add_argument(
        "--page-voxels",
        type=int,
        default=MAX_VOXELS,
        metavar="N",
        help="scans of more voxels are shown at half resolution (default: %(default)s)",
    )
    parser.add_argument(
        "--with-patient-data",
        action="store_true",
        help="show the patient's name, ID, sex, age and study date of a DICOM series",
    )
    parser.add_argument("--version", action="version", version=lungkit.__version__)
    return run_command(lambda: _run(parser.parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    if options.page_voxels < 1:
        raise UsageError(f"--page-voxels must be at least 1, got {options.page_voxels}")
    if not options.path.exists():
        raise DataError(f"{options.path}: no such file or folder")
    if options.mask or options.map or options.path.is_file():
        return _scan(options)
    return _folder(options)


def _scan(options: argparse.Namespace) -> int:
    from lungkit._temporary import remove_leftovers
    from lungkit.data import read_volume
    from lungkit.pipeline import find_scans
    from lungkit.pipeline.scan_pages import write_files_page
    from lungkit.report.html.page import check_ours
    from lungkit.report.mask_files import MaskReader

    if options.scans or options.labels:
        raise UsageError(
            "--scans and --labels go with a folder of predictions; a scan takes --mask NAME=FILE"
        )
    found = find_scans(options.path).scans
    if len(found) > 1:
        raise UsageError(f"{options.path} holds {len(found)} scans; name one of them for --mask and --map")
    path = options.output or Path(f"{found[0].name}.html")
    check_ours(path)
    remove_leftovers(path.parent, [path.name])
    scan = found[0].load()
    reader = MaskReader({"background": 0, "foreground": 1})
    masks = [(name, reader.read_on(file, scan.volumes[0])) for name, file in map(_named, options.mask)]
    maps = [(name, None, read_volume(file)) for name, file in map(_named, options.map)]
    write_files_page(
        path,
        found[0].name,
        scan,
        masks,
        maps=maps,
        patient_data=options.with_patient_data,
        max_voxels=options.page_voxels,
    )
    _LOG.info("wrote %s", path)
    return 0


def _folder(options: argparse.Namespace) -> int:
    from lungkit.pipeline.folder_report import kind_of, write_folder_report
    from lungkit.pipeline.prediction_pages import write_prediction_pages

    if options.output is not None:
        raise UsageError("--output names the page of a scan; a folder of results gets its report.html")
    failed: dict[str, str] = {}
    if options.scans is not None:
        if kind_of(options.path) not in ("predictions", None):
            raise UsageError(
                f"--scans goes with predictions, but {options.path} is of another kind: {kind_of(options.path)}"
            )
        failed = write_prediction_pages(
            options.path,
            options.scans,
            labels=options.labels,
            patient_data=options.with_patient_data,
            max_voxels=options.page_voxels,
        )
    elif options.labels is not None:
        raise UsageError("--labels shows true masks on the scans; give --scans too")
    _LOG.info("wrote %s", write_folder_report(options.path))
    for name, message in failed.items():
        _LOG.error("no page of %s: %s", name, message)
    return DataError.exit_code if failed else 0


def _named(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not name or not file:
        raise UsageError(f"{text!r} must be NAME=FILE, e.g. truth=label.nii.gz")
    return name, Path(file)
