"""``lungkit-predict``: from scans, NIfTI or DICOM, to masks on the scans' own grid."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import lungkit
from lungkit._temporary import remove_leftovers
from lungkit._terminal import progress_bars
from lungkit.cli._common import run_command
from lungkit.cli._parser import CommandParser
from lungkit.cli._points import add_arguments, default_model, is_pointing, segment_points, with_signs
from lungkit.cli._shares import launcher_around, parse_shard
from lungkit.errors import DataError, UsageError, readable, shorten

if TYPE_CHECKING:
    from lungkit.inference import Postprocessing, Predictor
    from lungkit.pipeline import OutputFiles, Wanted

_LOG = logging.getLogger("lungkit")

_EPILOG = """
Written to the output folder: NAME.nii.gz (uint8, on the scan's own grid), reports/NAME.json (volumes, diameters,
lesions), previews/NAME.png, results.jsonl and results.csv, a line a scan, and for a browser report.html with a
viewer for each scan, pages/NAME.html. The same command again does what is missing.
One scan that cannot be used does not stop the rest; it is named, and the exit code says so.
Examples:
  lungkit-predict -i scan.nii.gz -o mask.nii.gz --model runs/NAME     one scan
  lungkit-predict -i scan.nii.gz -o mask.nii.gz --at -42.5,18,120     the nodule at a point, with the package's model
  lungkit-predict -i scans/ -o masks/ --model runs/A runs/B --tta     a folder; two models and their mirror images
  lungkit-predict -i series/ -o out/ --model runs/NAME --format dicom-seg dicom-sr dicom-sc
  lungkit-predict -i scans/ -o masks/ --model runs/NAME --shard 0/8   a share; then: lungkit-predict merge masks/
Nothing is shared out without --shard, whatever torchrun or Slurm say. A share that holds no scan is an error (2).
Exit codes: 0 ok, 2 usage, 3 bad data, 4 checkpoint, 5 resources, 75 interrupted and saved.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["merge"]:
        return run_command(lambda: _merge(given[1:]))
    return run_command(lambda: _run_on(_options(given)))


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(with_signs(given))
    if options.model is None:
        if not is_pointing(options):
            parser.error("--model is required: a run folder, or a name of lungkit-models list")
        options.model = [default_model()]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lungkit-predict",
        description="Segment CT scans with a trained model. `lungkit-predict merge FOLDER` puts shares together.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add(
        "-i",
        "--input",
        type=Path,
        required=True,
        metavar="IN",
        help="a scan (.nii, .nii.gz), a folder of scans, DICOM series at any depth of a folder, or a .zip of these",
    )
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder for the results, or the mask's file (.nii.gz) for a single scan",
    )
    add(
        "--model",
        type=Path,
        nargs="+",
        action="extend",
        metavar="RUN",
        help="run folder, checkpoint or a name of lungkit-models; several, or the folder of all folds, are an "
        "ensemble, the mean of their probabilities",
    )
    add(
        "--format",
        nargs="+",
        default=["nifti"],
        choices=("nifti", "dicom-seg", "rtstruct", "dicom-sr", "dicom-sc"),
        help="of the mask (default: nifti); the others refer to the images of a DICOM series: segmentation, contours, "
        "a structured report of every lesion with its segments, the preview as a secondary capture",
    )
    add("--series", metavar="UID", help="which series of a DICOM folder that holds several")
    add(
        "--tta",
        action=argparse.BooleanOptionalAction,
        help="average over the mirror images of every patch: 4 (2D) or 8 times as long (default: as the model says, "
        "which is no but for those of nnU-Net)",
    )
    add(
        "--overlap",
        type=float,
        default=0.5,
        help="of neighbouring patches, from 0 up to below 1 (default: 0.5)",
    )
    add("--batch-size", type=int, metavar="N", help="patches in one call (default: by their size)")
    add("--device", help="cuda, cuda:1, cpu, ... (default: the GPU where there is one)")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="number format of the network (default: that of its validation where the device computes with it)",
    )
    add("--probabilities", action="store_true", help="write the probability of every class, float32")
    add("--attention", action="store_true", help="write the attention map of the finest gate, float32")
    add("--no-preview", dest="preview", action="store_false", help="no pictures")
    add("--no-report", dest="report", action="store_false", help="no pages for the browser")
    add(
        "--with-patient-data",
        action="store_true",
        help="show the patient's name, ID, sex, age and study date of a DICOM series on its page",
    )
    group = parser.add_argument_group(
        "postprocessing", "off unless training chose it (--choose_postprocessing)"
    )
    add = group.add_argument
    add(
        "--threshold",
        type=float,
        help="foreground where its probability is at least this (default: most probable)",
    )
    add(
        "--lesion-probability",
        type=float,
        metavar="P",
        help="remove lesions of which no voxel has this probability",
    )
    add("--smallest-lesion-ml", type=float, metavar="ML", help="remove lesions that are smaller")
    add(
        "--lesion-share",
        type=float,
        metavar="S",
        help="remove lesions below this share of the scan's largest by probability mass; 1: all but the largest",
    )
    add("--fill-holes", action=argparse.BooleanOptionalAction, help="close holes within axial slices")
    add(
        "--inside-lungs",
        action=argparse.BooleanOptionalAction,
        help="remove lesions that lie outside the lungs (HU)",
    )
    add("--no-postprocessing", action="store_true", help="not what training chose either")
    group = parser.add_argument_group("many scans")
    add = group.add_argument
    add(
        "--shard",
        metavar="I/N",
        help="predict share I (from 0) of N; auto takes it from torchrun or a Slurm array (default: all scans)",
    )
    add("--overwrite", action="store_true", help="replace what OUT holds")
    add("--max-voxels", type=int, metavar="N", help="refuse larger scans, as they are or resampled")
    add(
        "--strict",
        action="store_true",
        help="refuse scans of other intensities or voxel sizes than those of training, or of a doubtful header",
    )
    add(
        "--nan",
        choices=("refuse", "minimum"),
        default="refuse",
        help="scans with voxels that are NaN or infinite: refuse them (default), or take the smallest value there",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print what became of the scans, or the nodules at points, as JSON",
    )
    add_arguments(parser)
    parser.add_argument("--version", action="version", version=lungkit.__version__)
    return parser


def _run_on(options: argparse.Namespace) -> int:
    from lungkit.data.zip_archive import unpacked

    with unpacked(options.input) as options.input:
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    from lungkit.data import DEFAULT_MAX_VOXELS, NanPolicy
    from lungkit.inference import Predictor, TrainedModel, model_folder
    from lungkit.inference.trained_model import model_folders
    from lungkit.pipeline import (
        OutputFiles,
        Records,
        Wanted,
        check_formats,
        claim,
        find_scans,
        predict_scans,
        share_of,
    )

    models = [
        TrainedModel.load(path) for given in options.model for path in model_folders(model_folder(given))
    ]
    predictor = Predictor(
        models,
        device=options.device,
        precision=options.precision,
        overlap=options.overlap,
        mirror=options.tta,
        batch_size=options.batch_size,
        postprocessing=_postprocessing(options, models[0].postprocessing),
        strict=options.strict,
        max_voxels=options.max_voxels or DEFAULT_MAX_VOXELS,
    )
    if options.attention:
        predictor.check_attention()
    found = find_scans(options.input, channels=len(models[0].channels), series=options.series)
    scans = found.scans
    for path, reason in found.passed_over.items():
        _LOG.warning("passed over: %s: %s", readable(path), reason)
    files = OutputFiles(
        options.output,
        tuple(dict.fromkeys(options.format)),
        preview=options.preview,
        page=options.report,
        patient_data=options.with_patient_data,
    )
    files.check()
    check_formats(files.formats, scans)
    if is_pointing(options):
        return segment_points(options, predictor, scans, files)
    shard = parse_shard(options.shard, os.environ)
    launcher = launcher_around(os.environ) if options.shard is None and len(scans) > 1 else None
    if launcher is not None:
        _LOG.info("%s runs several of this command; each predicts all scans, --shard auto a share", launcher)
    records = None
    wanted = Wanted(options.probabilities, options.attention)
    if files.is_file:
        if options.shard is not None:
            raise UsageError(
                f"--shard shares out many scans, but --output {files.path} is the file of one mask"
            )
        _check_single_file(files, wanted, predictor, len(scans), options.overwrite)
    else:
        claim(files.path, _plan(predictor, options), overwrite=options.overwrite)
        records = Records(files.path, shard)
    mine = share_of(scans, *shard)
    if records is not None and not mine:
        records.write()  # so that merging knows of this share
        raise UsageError(
            f"nothing to do: share {shard[0]} of {shard[1]} holds no scan, as {options.input} holds {len(scans)}; "
            f"divide them into at most {len(scans)} shares"
        )
    if shard[1] > 1:
        _LOG.info("share %d of %d: %d of %d scans", *shard, len(mine), len(scans))
    with _Bars(len(mine)) as bars:
        outcome = predict_scans(
            predictor,
            mine,
            files,
            records,
            wanted=wanted,
            max_voxels=options.max_voxels or DEFAULT_MAX_VOXELS,
            watcher=bars,
            overwrite=options.overwrite,
            nan_policy=NanPolicy(options.nan),
        )
    if records is not None:
        records.write()
        if options.report and shard[1] == 1:
            _write_report(files.path)
    rate = 3600 * len(outcome.predicted) / outcome.seconds if outcome.seconds else 0.0
    _LOG.info(
        "%d predicted (%.0f scans per hour), %d done before, %d failed, %d passed over; results in %s",
        len(outcome.predicted),
        rate,
        len(outcome.skipped),
        len(outcome.failed),
        len(found.passed_over),
        files.path,
    )
    for name, message in outcome.failed.items():
        _LOG.error("failed: %s: %s", name, message)
    for path in found.passed_over:
        _LOG.error("passed over: %s", readable(path))
    if options.json:
        outcomes = {
            "output": str(files.path),
            "predicted": outcome.predicted,
            "done_before": outcome.skipped,
            "failed": outcome.failed,
            "passed_over": {readable(path): reason for path, reason in found.passed_over.items()},
            "seconds": round(outcome.seconds, 3),
        }
        sys.stdout.write(json.dumps(outcomes, indent=2) + "\n")
    return max(outcome.exit_code, DataError.exit_code if found.passed_over else 0)


def _merge(arguments: Sequence[str]) -> int:
    from lungkit.pipeline import merge
    from lungkit.report.html.summary_page import PAGES

    parser = CommandParser(
        prog="lungkit-predict merge",
        description="Put the records of all shares together.",
    )
    parser.add_argument("folder", type=Path, help="output folder of the shares")
    folder = parser.parse_args(arguments).folder
    rows = merge(folder)
    failed = [row["scan"] for row in rows if row.get("status") != "ok"]
    if (folder / PAGES).is_dir():  # the shares were to have pages
        _write_report(folder)
    _LOG.info(
        "%d scans, %d failed; %s and results.csv written", len(rows), len(failed), folder / "results.jsonl"
    )
    for name in failed:
        _LOG.error("failed: %s", name)
    return DataError.exit_code if failed else 0


def _write_report(folder: Path) -> None:
    """Write ``report.html``, which lists the scans; where it cannot be, the masks are there nonetheless."""
    from lungkit.pipeline.folder_report import REPORT, write_folder_report
    from lungkit.report.pictures import optional_page

    with optional_page(folder / REPORT):
        write_folder_report(folder)


def _postprocessing(options: argparse.Namespace, trained: Postprocessing) -> Postprocessing:
    """What training chose, or nothing, with what the command line says on top."""
    from lungkit.inference import Postprocessing

    base = Postprocessing() if options.no_postprocessing else trained
    given = {
        name: value
        for name in (field.name for field in fields(Postprocessing))
        if (value := getattr(options, name)) is not None
    }
    return replace(base, **given)


def _plan(predictor: Predictor, options: argparse.Namespace) -> dict[str, Any]:
    """What makes the predictions of a folder these and no others; not the device nor what follows from it."""
    return {
        "models": [model.to_dict() for model in predictor.models],
        "postprocessing": predictor.postprocessing.to_dict(),
        "mirrored": predictor.mirror,
        "overlap": predictor.overlap,
        "precision": options.precision,
        "formats": sorted(set(options.format)),
        "probabilities": options.probabilities,
        "attention": options.attention,
        "previews": options.preview,
        # Only where it is asked for: folders of before go on.
        **({"nan": options.nan} if options.nan != "refuse" else {}),
    }


def _check_single_file(
    files: OutputFiles, wanted: Wanted, predictor: Predictor, scans: int, overwrite: bool
) -> None:
    path = files.path
    if scans > 1:
        raise UsageError(f"--output {path} is a file, but the input holds {scans} scans; name a folder")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: the folder {path.parent} does not exist; make it first")
    classes = predictor.labels if wanted.probabilities else ()
    ours = files.of("", classes, attention=wanted.attention)
    remove_leftovers(path.parent, [file.name for file in ours])
    there = [file for file in ours if file.exists()]
    if there and not overwrite:
        raise UsageError(f"{shorten(there)} exists; name another --output, or replace it with --overwrite")


class _Bars:
    """Bars for the scans and for the patches of one; nothing where the output goes to a file."""

    def __init__(self, total: int) -> None:
        from rich.progress import TextColumn

        self._bars = progress_bars(TextColumn("{task.fields[rate]}"))
        self._scans = self._bars.add_task("scans", total=total, rate="")
        self._patches = self._bars.add_task("patches", total=None, rate="")
        self._started = time.monotonic()

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def patches(self, name: str, done: int, total: int) -> None:
        """Patches of the scan that is being predicted."""
        self._bars.update(self._patches, description=readable(name), completed=done, total=total)

    def scan_done(self, name: str, done: int, total: int) -> None:
        """Scans done."""
        rate = 3600 * done / max(time.monotonic() - self._started, 1e-3)
        self._bars.update(self._scans, completed=done, total=total, rate=f"{rate:.0f} scans per hour")
