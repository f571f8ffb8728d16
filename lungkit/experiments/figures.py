"""Figures of a comparison: distributions, training curves, the same slices under every arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lungkit.experiments.results import merge_runs
from lungkit.experiments.runs import FinishedRun, epoch_rows
from lungkit.metrics import CaseTable
from lungkit.pipeline.folder_report import REPORT, write_folder_report
from lungkit.pipeline.labelled import draw_overlays
from lungkit.report import save_curves, save_distributions
from lungkit.report.html.summary_page import PAGES
from lungkit.report.pictures import optional_page, optional_picture


def draw_comparison(
    output: Path,
    runs: Mapping[str, Sequence[FinishedRun]],
    tables: Mapping[str, Sequence[CaseTable]],
    metrics: Sequence[str],
    *,
    report: bool = False,
) -> None:
    """Draw distributions of ``metrics``, training curves and, under ``overlays``, three cases chosen by rule.

    Curves and cases are those of the first run of every arm. With ``report`` the same cases have pages for the browser,
    models side by side, and ``report.html`` shows everything that is in the folder.
    """
    first = {name: found[0] for name, found in tables.items()}
    merged = {name: merge_runs(found) for name, found in tables.items()}
    with optional_picture(output / "distributions.png"):
        save_distributions(output / "distributions.png", merged, metrics)
    curves = {name: epoch_rows(loaded[0].path) for name, loaded in runs.items()}
    shown = ("epoch", "train_loss", "val_dice", "learning_rate")
    with optional_picture(output / "curves.png"):
        save_curves(
            output / "curves.png",
            {
                name: [{column: row[column] for column in shown} for row in rows]
                for name, rows in curves.items()
            },
        )
    overlays = output / "overlays"
    overlays.mkdir(exist_ok=True)
    for old in overlays.glob("*.png"):
        old.unlink()
    draw_overlays(
        overlays,
        {name: loaded[0].predictor for name, loaded in runs.items()},
        next(iter(runs.values()))[0].scans,
        first,
        pages=output / PAGES if report else None,
    )
    if report:
        with optional_page(output / REPORT):
            write_folder_report(output)
