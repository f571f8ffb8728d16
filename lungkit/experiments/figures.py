"""Figures of a comparison: distributions, training curves, the same slices under every arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lungkit.data.dataset import IGNORE_INDEX
from lungkit.experiments.results import merge_runs
from lungkit.experiments.runs import LoadedRun, epoch_rows
from lungkit.metrics import CaseTable
from lungkit.report import choose_slice, save_curves, save_distributions, save_overlays


def draw_comparison(
    output: Path,
    runs: Mapping[str, Sequence[LoadedRun]],
    tables: Mapping[str, Sequence[CaseTable]],
    metrics: Sequence[str],
) -> None:
    """Draw distributions of ``metrics``, training curves and, under ``overlays``, three cases chosen by rule.

    Curves and cases are those of the first run of every arm.
    """
    first = {name: found[0] for name, found in tables.items()}
    merged = {name: merge_runs(found) for name, found in tables.items()}
    save_distributions(output / "distributions.png", merged, metrics)
    curves = {name: epoch_rows(loaded[0].path) for name, loaded in runs.items()}
    shown = ("epoch", "train_loss", "val_dice", "learning_rate")
    save_curves(
        output / "curves.png",
        {name: [{column: row[column] for column in shown} for row in rows] for name, rows in curves.items()},
    )
    overlays = output / "overlays"
    overlays.mkdir(exist_ok=True)
    for old in overlays.glob("*.png"):
        old.unlink()
    for rank, case_id in representative_cases(first).items():
        _draw_case(
            overlays / f"{rank}-{case_id}.png", rank, case_id, {n: r[0] for n, r in runs.items()}, first
        )


def representative_cases(tables: Mapping[str, CaseTable]) -> dict[str, str]:
    """Worst, median and best case by the mean Dice of all arms, so that the choice favours none; ties by name.

    Example:
        >>> first, second = CaseTable(), CaseTable()
        >>> for case, dice in {"a": 0.9, "b": 0.2, "c": 0.7}.items():
        ...     first.add_row(case, "tumour", {"dice": dice})
        ...     second.add_row(case, "tumour", {"dice": dice - 0.1})
        >>> representative_cases({"A": first, "B": second})
        {'worst': 'b', 'median': 'c', 'best': 'a'}
    """
    dice: dict[str, list[float]] = {}
    for table in tables.values():
        for row in table.of_label(table.labels[0]):
            dice.setdefault(row.case_id, []).append(row.values["dice"])
    ranked = sorted(
        (float(np.mean(values)), case_id) for case_id, values in dice.items() if not np.isnan(values).any()
    )
    if not ranked:
        return {}
    return {"worst": ranked[0][1], "median": ranked[len(ranked) // 2][1], "best": ranked[-1][1]}


def _draw_case(
    path: Path, rank: str, case_id: str, runs: Mapping[str, LoadedRun], tables: Mapping[str, CaseTable]
) -> None:
    some = next(iter(runs.values()))
    case = some.case(case_id)
    truth = np.asarray(case.label)
    predictions = {name: run.predict(run.case(case_id)) for name, run in runs.items()}
    slice_index = choose_slice(truth, next(iter(predictions.values())), ignore_index=IGNORE_INDEX)
    maps = {name: run.attention(run.case(case_id), slice_index) for name, run in runs.items()}
    dice = {
        name: next(row.values["dice"] for row in table.rows if row.case_id == case_id)
        for name, table in tables.items()
    }
    shown = ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
    save_overlays(
        path,
        case.image_float(),
        truth,
        predictions,
        {name: alpha for name, alpha in maps.items() if alpha is not None},
        slice_index=slice_index,
        spacing_mm=case.spacing_mm,
        ignore_index=IGNORE_INDEX,
        title=f"{rank} held-out case {case_id} (Dice: {shown})",
    )
