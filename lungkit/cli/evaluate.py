"""``lungkit-evaluate``: measure a folder of predicted masks against a folder of true ones."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lungkit
from lungkit._atomic import check_new, new_folder
from lungkit._terminal import progress_bars
from lungkit.cli._common import run_command
from lungkit.cli._parser import CommandParser
from lungkit.errors import DataError, UsageError, readable, shorten

if TYPE_CHECKING:
    from lungkit.data import Dataset
    from lungkit.report.evaluation import LabelScheme
    from lungkit.report.readers import ReaderMeasurements

_LOG = logging.getLogger("lungkit")

_EPILOG = """
Written to the output folder: metrics.csv (cases), metrics_summary.csv, metrics.json (with the definition of every
metric), metrics.md, metrics.txt, distribution.png, and for a browser report.html with pages/ of worst, median and
best case. Of a dataset with several readers (votesTr or readersTr beside
labelsTr) also readers.* (each level of agreement, and the readers' own Dice) and, with --probabilities,
calibration.json and reliability.png.
Examples:
  lungkit-evaluate predictions/ labelsTr/                every metric of every case in both folders
  lungkit-evaluate predictions/ DATASET/                 labels and their names from a dataset's folder
  lungkit-evaluate predictions/ DATASET/ --readers 4     beside the votes of four readers
  lungkit-evaluate a.nii.gz b.nii.gz --label tumour=2    two files, and which value is the tumour
  lungkit-evaluate mask.nii.gz RS.dcm --roi 'GTV.*=tumour'    a DICOM RTSTRUCT or SEG, on the grid of the other file
  lungkit-evaluate seg.dcm RS.dcm --scans DIR            two of them, on that of the series they were made on
Exit codes: 0 ok, 2 usage, 3 bad data: a case could not be measured or is on one side only; the others are measured.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(lambda: _run(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    from lungkit.data import DEFAULT_MAX_VOXELS
    from lungkit.metrics import EmptyPolicy, HausdorffDefinition, MetricGroup, MetricOptions

    defaults = MetricOptions()
    parser = CommandParser(
        prog="lungkit-evaluate",
        description="Measure predicted masks against true ones: overlap, surface distances, lesions, sizes.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "predictions",
        type=Path,
        help="folder of predicted masks (.nii, .nii.gz, DICOM SEG or RTSTRUCT), or one file",
    )
    parser.add_argument(
        "labels", type=Path, help="folder of true masks of the same names, a dataset, or one file"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help='new folder for the results (default: "evaluation", numbered if it exists)',
    )
    parser.add_argument(
        "--label",
        action="append",
        metavar="NAME=VALUE",
        help="a class and its value in the files, repeatable; ignore=VALUE leaves voxels out "
        "(default: from dataset.json beside the labels, else foreground=1)",
    )
    parser.add_argument(
        "--roi",
        action="append",
        default=[],
        metavar="REGEX=LABEL",
        help="structures of DICOM masks whose whole name fits, in any case, are of this class; repeatable "
        "(default, and where a mask has none that fits: those called like the classes)",
    )
    parser.add_argument(
        "--scans",
        type=Path,
        metavar="DIR",
        help="where the CT series of DICOM masks are, at any depth (default: the other mask's grid is taken)",
    )
    parser.add_argument(
        "--readers",
        type=int,
        metavar="N",
        help="how many readers the votes in votesTr are of (default: as dataset.json says)",
    )
    parser.add_argument(
        "--probabilities",
        type=Path,
        metavar="DIR",
        help="with CASE_CLASS.nii.gz, as lungkit-predict --probabilities writes them; calibration is measured against "
        "the share of readers (default: PREDICTIONS/probabilities, where there is one)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=[group.value for group in MetricGroup],
        default=[group.value for group in defaults.groups],
        help="families of metrics (default: all)",
    )
    parser.add_argument(
        "--percentile", type=float, default=defaults.percentile, help="of the Hausdorff distance"
    )
    parser.add_argument(
        "--hausdorff",
        choices=[definition.value for definition in HausdorffDefinition],
        default=defaults.hausdorff.value,
        help="larger of the two directed percentiles, or percentile of both directions pooled",
    )
    parser.add_argument(
        "--tolerance-mm", type=float, default=defaults.tolerance_mm, help="of the surface Dice"
    )
    parser.add_argument("--min-iou", type=float, default=defaults.min_iou, help="for two lesions to match")
    parser.add_argument(
        "--empty",
        choices=[policy.value for policy in EmptyPolicy],
        default=defaults.empty.value,
        help="what a metric is where masks are empty and its formula does not say",
    )
    parser.add_argument(
        "--common-only", action="store_true", help="cases on one side only are named, but are no error"
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="the scans, of the same names, to show worst, median and best case on (default: those of the dataset)",
    )
    parser.add_argument(
        "--no-report", dest="report", action="store_false", help="no report.html and pages for the browser"
    )
    parser.add_argument("-j", "--jobs", type=int, help="cases at a time (default: one a core)")
    parser.add_argument(
        "--max-voxels",
        type=int,
        default=DEFAULT_MAX_VOXELS,
        help="refuse larger files (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print metrics.json in place of the table")
    parser.add_argument("--version", action="version", version=lungkit.__version__)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from lungkit.data.dicom.archive import find_archive
    from lungkit.data.dicom.read_label import StructureRule
    from lungkit.metrics import EmptyPolicy, HausdorffDefinition, MetricGroup, MetricOptions
    from lungkit.metrics.surface import available_cpus
    from lungkit.pipeline.evaluation_pages import find_images, write_evaluation_pages
    from lungkit.pipeline.folder_report import REPORT, write_folder_report
    from lungkit.report import evaluation as evaluating
    from lungkit.report.html.summary_page import PAGES
    from lungkit.report.mask_files import MaskReader, find_pairs
    from lungkit.report.pictures import optional_page
    from lungkit.report.readers import measure_pairs

    options = MetricOptions(
        groups=tuple(MetricGroup(name) for name in arguments.metrics),
        percentile=arguments.percentile,
        hausdorff=HausdorffDefinition(arguments.hausdorff),
        tolerance_mm=arguments.tolerance_mm,
        min_iou=arguments.min_iou,
        empty=EmptyPolicy(arguments.empty),
    )
    if arguments.max_voxels < 1:
        raise UsageError(f"--max-voxels must be at least 1, got {arguments.max_voxels}")
    found = find_pairs(arguments.predictions, arguments.labels)
    rules = tuple(StructureRule.parse(text) for text in arguments.roi)
    if arguments.label:
        scheme = evaluating.parse_labels(arguments.label)
    else:
        scheme = evaluating.find_label_scheme(arguments.labels)
        if rules and scheme == evaluating.FOREGROUND:
            names = dict.fromkeys(rule.label for rule in rules)
            scheme = evaluating.LabelScheme(
                {"background": 0, **{name: n for n, name in enumerate(names, start=1)}}
            )
    unknown = sorted({rule.label for rule in rules} - scheme.values.keys())
    if unknown:
        raise UsageError(
            f"--roi: {shorten(unknown)} is none of the classes {shorten(scheme.values)}; see --label"
        )
    archive = None if arguments.scans is None else find_archive(arguments.scans)
    jobs = min(available_cpus() if arguments.jobs is None else arguments.jobs, len(found.pairs))
    if jobs > 1:
        torch.set_num_threads(1)  # each job has a core of its own
    reader = MaskReader(scheme.values, rules, archive, arguments.max_voxels)
    beside = _readers_of(arguments, scheme)
    if arguments.output is not None:
        check_new(arguments.output)
    with _Bar(len(found.pairs)) as bar:
        evaluation = evaluating.evaluate_pairs(
            found.pairs,
            scheme,
            options=options,
            jobs=jobs,
            reader=reader,
            progress=bar.update,
        )
    if not evaluation.table.rows and len(found.pairs) == 1:  # of many, the files say which failed and why
        raise DataError(f"not measured, nothing is written: {next(iter(evaluation.failed.values()))}")
    notes: list[str] = []
    if beside is not None:
        dataset, readers = beside
        folder_of_maps = arguments.predictions / "probabilities"
        measure_pairs(
            readers,
            {name: pair for name, pair in found.pairs.items() if name not in evaluation.failed},
            dataset,
            scheme,
            reader,
            probabilities=arguments.probabilities or (folder_of_maps if folder_of_maps.is_dir() else None),
        )
        notes = readers.ceiling_notes()
    with new_folder(_names(arguments.output)) as new:
        text = evaluating.write_evaluation(new.path, evaluation, found, options, scheme, notes=notes)
        if beside is not None and readers.table.rows:
            text += "\n\n" + readers.write(new.path)
        if arguments.json:
            text = (new.path / "metrics.json").read_text().rstrip("\n")
        if arguments.report:
            with optional_page(new.path / REPORT):
                images = find_images(arguments.labels, arguments.images)
                write_evaluation_pages(
                    new.path / PAGES, found.pairs, scheme, reader, evaluation.table, images
                )
                write_folder_report(new.path)
    sys.stdout.write(text + "\n")
    _LOG.info("everything is in %s", new.path)
    return _exit_code(evaluation.failed, found.without_prediction, found.without_label, arguments.common_only)


def _readers_of(
    arguments: argparse.Namespace, scheme: LabelScheme
) -> tuple[Dataset, ReaderMeasurements] | None:
    """The labels' dataset and what measures beside its readers; None where it has one, or nobody knows how many."""
    from lungkit.data.readers import reader_codes
    from lungkit.report.readers import ReaderMeasurements, dataset_of_readers

    dataset = dataset_of_readers(arguments.labels)
    for option in ("readers", "probabilities"):
        if dataset is None and getattr(arguments, option) is not None:
            raise UsageError(
                f"--{option}: {arguments.labels} has labels of one reader; expected a dataset with votesTr or readersTr"
            )
    if dataset is None or dataset.readers is None:
        return None
    if dataset.readers.count is None and arguments.readers is None:
        _LOG.warning(
            "%s: has votes of several readers; give --readers N to measure beside them", dataset.root
        )
        return None
    codes = reader_codes(dataset, readers=arguments.readers)
    return dataset, ReaderMeasurements(codes, scheme.class_indices)


def _exit_code(
    failed: dict[str, str], without_prediction: Sequence[str], without_label: Sequence[str], common_only: bool
) -> int:
    for what, cases in (("prediction", without_prediction), ("label", without_label)):
        if cases:
            _LOG.warning("%d cases have no %s: %s", len(cases), what, shorten(cases, limit=20))
    for message in failed.values():
        _LOG.error("not measured: %s", message)
    one_sided = bool(without_prediction or without_label) and not common_only
    return DataError.exit_code if failed or one_sided else 0


def _names(asked: Path | None) -> Iterator[Path]:
    """The folder asked for, or "evaluation", numbered where it exists."""
    if asked is not None:
        yield asked
        return
    for number in itertools.count(1):
        yield Path("evaluation" if number == 1 else f"evaluation-{number}")


class _Bar:
    """A progress bar on a terminal; nothing where the output goes to a file."""

    def __init__(self, total: int) -> None:
        self._bars = progress_bars()
        self._task = self._bars.add_task("measuring", total=total)

    def __enter__(self) -> _Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, case_id: str, done: int, total: int) -> None:
        """``done`` of ``total`` cases are measured, the last one is ``case_id``."""
        self._bars.update(self._task, completed=done, total=total, description=readable(case_id))
