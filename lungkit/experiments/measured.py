"""Measurements of runs, each made once: a table that was written for the same weights and scans is read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lungkit._reading import read_json
from lungkit.checkpoint import sha256_of
from lungkit.experiments.runs import FinishedRun
from lungkit.metrics import CaseTable, MetricOptions
from lungkit.pipeline.labelled import measure_scans
from lungkit.report import case_table_from_dict
from lungkit.report.evaluation import write_measured

_KEY = "measured"


def measure_run(
    run: FinishedRun,
    cases: Path,
    name: str,
    options: MetricOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> CaseTable:
    """The metrics of a run's cases, from ``cases/NAME.json`` where that holds them, else measured and written there.

    Args:
        run: predicted as ``lungkit-predict`` does, measured as ``lungkit-evaluate`` does.
        cases: an existing folder.
        name: of the files in it.
        options: which metrics, under which definitions.
        progress: called after each case with the cases done and the cases in all.
    """
    key = _key_of(run, options)
    found = _read(cases / f"{name}.json", key)
    if found is None:
        found = measure_scans(run.predictor, run.scans, options=options, progress=progress)
        write_measured(cases, found, options, name=name, extra={_KEY: key})
    return found


def is_measured(run: FinishedRun, cases: Path, name: str, options: MetricOptions) -> bool:
    """Whether ``cases/NAME.json`` holds what :func:`measure_run` would measure."""
    return _read(cases / f"{name}.json", _key_of(run, options)) is not None


def _key_of(run: FinishedRun, options: MetricOptions) -> dict[str, Any]:
    """What makes a measurement this one: weights, cases and definitions."""
    return {
        "weights": sha256_of(run.weights / "manifest.json"),
        "dataset": str(run.scans.dataset.root),
        "cases": list(run.scans.case_ids),
        "definitions": options.definitions(),
        "empty": options.empty.value,
    }


def _read(path: Path, key: dict[str, Any]) -> CaseTable | None:
    try:
        content = read_json(path)
        return case_table_from_dict(content) if content.get(_KEY) == key else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
