"""Figures of a comparison: effects, distributions, training curves, the same slices under every arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lungkit.experiments.results import LOWER_IS_BETTER, ComparisonRow, merge_runs
from lungkit.experiments.runs import FinishedRun, epoch_rows
from lungkit.metrics import CaseTable
from lungkit.pipeline.folder_report import REPORT, write_folder_report
from lungkit.pipeline.labelled import draw_overlays
from lungkit.report import metric_title, save_curves, save_distributions
from lungkit.report.forest import Effect, save_forest
from lungkit.report.html.summary_page import PAGES
from lungkit.report.pictures import optional_page, optional_picture

_EFFECTS = ("dice", "lesion_f1", "hd", "assd")
_MOST_OVERLAYS = 4


def draw_comparison(
    output: Path,
    runs: Mapping[str, Sequence[FinishedRun]],
    tables: Mapping[str, Sequence[CaseTable]],
    rows: Sequence[ComparisonRow],
    *,
    report: bool = False,
) -> None:
    """Draw effects, distributions, training curves and, under ``overlays``, three cases chosen by rule.

    Curves and cases are those of the first run of every arm. Of more than four arms, overlays show the first and the
    one with the best mean of the first metric. With ``report`` the same cases have pages for the browser, models side
    by side, and ``report.html`` shows everything that is in the folder.
    """
    metrics = list(dict.fromkeys(row.metric for row in rows))
    _draw_effects(output / "forest.png", rows)
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
    shown_arms = list(runs)
    if len(runs) > _MOST_OVERLAYS:
        best = max(rows[0].arms[1:], key=lambda arm: -math.inf if math.isnan(arm.mean) else arm.mean)
        shown_arms = [shown_arms[0], best.name]
    draw_overlays(
        overlays,
        {name: runs[name][0].predictor for name in shown_arms},
        next(iter(runs.values()))[0].scans,
        {name: first[name] for name in shown_arms},
        pages=output / PAGES if report else None,
    )
    if report:
        with optional_page(output / REPORT):
            write_folder_report(output)


def _draw_effects(path: Path, rows: Sequence[ComparisonRow]) -> None:
    """A forest plot of the first class: Dice, lesion F1 and the surface distances."""
    label = rows[0].label
    chosen = [row for row in rows if row.label == label and row.metric.startswith(_EFFECTS)]
    effects = {
        metric_title(row.metric): [
            Effect(arm.name, found.mean_difference, found.interval, p)
            for arm, found, p in zip(row.arms[1:], row.comparisons, row.p_adjusted, strict=True)
        ]
        for row in chosen
    }
    lower = [metric_title(row.metric) for row in chosen if row.metric.startswith(LOWER_IS_BETTER)]
    with optional_picture(path):
        save_forest(path, effects, baseline=rows[0].arms[0].name, lower_is_better=lower)
