"""What an experiment found: each metric of each arm with its interval, and the paired difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungkit.errors import UsageError
from lungkit.metrics import (
    CaseRow,
    CaseTable,
    Interval,
    PairedComparison,
    bca_interval,
    compare_paired,
    holm,
)
from lungkit.report import format_rows, format_value, metric_title

LOWER_IS_BETTER = ("hd", "assd")
"""How the names of distances begin."""
_TERMINAL_WIDTH = 100
_GAP = 2  # between the columns of a text table


@dataclass(frozen=True)
class ArmSummary:
    """One metric of one arm over the held-out cases in which it is defined for every arm."""

    name: str
    mean: float
    interval: Interval
    cases: int
    undefined: int
    run_means: tuple[float, ...]
    """Mean over the cases of every single run (fold and seed)."""

    @property
    def run_spread(self) -> float:
        """Sample standard deviation of the means of the runs; NaN for one run."""
        return float(np.std(self.run_means, ddof=1)) if len(self.run_means) > 1 else math.nan


@dataclass(frozen=True)
class ComparisonRow:
    """One metric of one class: all arms, and each of the others compared with the first."""

    metric: str
    label: str
    arms: tuple[ArmSummary, ...]
    comparisons: tuple[PairedComparison, ...]
    """Of the second arm with the first, of the third, ..."""
    p_adjusted: tuple[float, ...]
    """Their p after Holm, over the arms."""
    paper: tuple[float, float] | None = None

    @property
    def comparison(self) -> PairedComparison:
        """Of the last arm with the first."""
        return self.comparisons[-1]


def compare_tables(
    arms: Mapping[str, Sequence[CaseTable]],
    metrics: Sequence[str],
    *,
    paper: Mapping[str, tuple[float, float]] | None = None,
    patients: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[ComparisonRow]:
    """Compare every arm with the first, case by case.

    A case's value is its mean over the runs (folds, seeds) that held it out, so that a case counts once however many
    runs there were; it is undefined where one of these is. Means, differences, intervals and tests are over the cases
    in which the metric is defined for every arm. Where patients have several cases, intervals and tests are by patient.
    The p of the arms are adjusted for their number, for each metric and class by itself.

    Args:
        arms: name -> a table a run; run i of every arm must hold the same cases.
        metrics: names of metrics of the tables.
        paper: metric -> published figures of the first and the last arm, to be shown beside.
        patients: case -> patient; None takes each case for a patient of its own.
        confidence: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UsageError: fewer than two arms, or runs that held out different cases.

    Example:
        >>> first, second = CaseTable(), CaseTable()
        >>> for case, dice in enumerate([0.5, 0.6, 0.8]):
        ...     first.add_row(str(case), "tumour", {"dice": dice})
        ...     second.add_row(str(case), "tumour", {"dice": dice + 0.1})
        >>> row = compare_tables({"A": [first], "B": [second]}, ["dice"])[0]
        >>> round(row.arms[0].mean, 3), round(row.comparison.mean_difference, 3), row.comparison.better
        (0.633, 0.1, 3)
    """
    if len(arms) < 2:
        raise UsageError(f"a comparison needs at least two arms, got {len(arms)}")
    tables = list(arms.values())
    for other in tables[1:]:
        if [table.case_ids for table in other] != [table.case_ids for table in tables[0]]:
            raise UsageError(
                "the arms were measured on different cases; compare runs of the same folds and seeds"
            )
    merged = {name: merge_runs(runs) for name, runs in arms.items()}
    case_ids = next(iter(merged.values())).case_ids
    clusters = None if patients is None else [patients.get(case_id, case_id) for case_id in case_ids]
    if clusters is not None and len(set(clusters)) == len(clusters):
        clusters = None
    bootstrap: dict[str, Any] = {
        "clusters": clusters,
        "confidence": confidence,
        "resamples": resamples,
        "seed": seed,
    }
    rows = []
    for label in tables[0][0].labels:
        for metric in metrics:
            measured = {name: table.column(metric, label) for name, table in merged.items()}
            # Means and their difference are of the same cases: those that every arm defines.
            shared = np.isfinite(np.stack(list(measured.values()))).all(axis=0)
            values = {name: np.where(shared, column, np.nan) for name, column in measured.items()}
            summaries = tuple(
                _summarise(name, values[name], arms[name], metric, label, bootstrap) for name in arms
            )
            first, *others = values.values()
            higher = not metric.startswith(LOWER_IS_BETTER)
            found = tuple(
                compare_paired(first, other, higher_is_better=higher, **bootstrap) for other in others
            )
            adjusted = tuple(holm([comparison.p_value for comparison in found]))
            rows.append(ComparisonRow(metric, label, summaries, found, adjusted, (paper or {}).get(metric)))
    return rows


def merge_runs(tables: Sequence[CaseTable]) -> CaseTable:
    """One row a case and class: its mean over the runs that hold it, NaN where it is undefined in one of them.

    Example:
        >>> first, second = CaseTable(), CaseTable()
        >>> first.add_row("a", "tumour", {"dice": 0.5})
        >>> second.add_row("a", "tumour", {"dice": 0.7})
        >>> merge_runs([first, second]).column("dice", "tumour").tolist()
        [0.6]
    """
    found: dict[tuple[str, str], list[CaseRow]] = {}
    for table in tables:
        for row in table.rows:
            found.setdefault((row.case_id, row.label), []).append(row)
    merged = CaseTable(empty=tables[0].empty)
    for (case_id, label), rows in sorted(found.items(), key=lambda item: item[0][0]):
        means = {name: math.fsum(row.values[name] for row in rows) / len(rows) for name in rows[0].values}
        merged.add_row(case_id, label, means, frozenset().union(*(row.decided_by_policy for row in rows)))
    return merged


def format_comparison(rows: Sequence[ComparisonRow], *, style: str = "text") -> str:
    """The comparison as a table; ``style`` as for :func:`lungkit.report.format_rows`, "csv" with bare numbers.

    Two arms stand side by side, a row a metric; of more arms each has a row for every metric.
    """
    if not rows:
        raise UsageError("there is nothing to compare")
    many = len(rows[0].arms) > 2
    if style == "csv":
        header, cells = (_csv_cells_by_arm if many else _csv_cells)(rows)
    else:
        header, cells = (_readable_cells_by_arm if many else _readable_cells)(rows)
    if style != "text":
        return format_rows(header, cells, style=style)
    keys = header.index("arm") + 1 if many else header.index(rows[0].arms[0].name)
    return "\n\n".join(format_rows(*part) for part in _split_columns(header, cells, keys))


def _split_columns(
    header: list[str], cells: list[list[str]], keys: int
) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Tables no wider than a terminal, one below the other: each begins with the first ``keys`` columns."""
    widths = [max(len(line[column]) for line in (header, *cells)) + _GAP for column in range(len(header))]
    chosen = list(range(keys))
    for column in range(keys, len(header) + 1):
        full = column == len(header) or sum(widths[i] for i in (*chosen, column)) - _GAP > _TERMINAL_WIDTH
        if full and len(chosen) > keys:
            yield [header[i] for i in chosen], [[line[i] for i in chosen] for line in cells]
            chosen = list(range(keys))
        chosen.append(column)


def _readable_cells(rows: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    names = [arm.name for arm in rows[0].arms]
    several_labels = len({row.label for row in rows}) > 1
    published = any(row.paper for row in rows)
    spread = len(rows[0].arms[0].run_means) > 1
    header = [
        "metric",
        *(["class"] if several_labels else []),
        *names,
        "difference",
        "p",
        "better / worse / equal",
    ]
    header += ["spread over runs"] if spread else []
    header += ["paper"] if published else []
    cells = []
    for row in rows:
        result = row.comparison
        line = [metric_title(row.metric), *([row.label] if several_labels else [])]
        line += [_with_interval(row.metric, arm.mean, arm.interval) for arm in row.arms]
        line += [_with_interval(row.metric, result.mean_difference, result.interval, sign=True)]
        line += [_format_p(result.p_value), f"{result.better} / {result.worse} / {result.equal}"]
        if spread:
            line.append(" / ".join(format_value(row.metric, arm.run_spread) for arm in row.arms))
        if published:
            line.append(" / ".join(f"{value:.3f}" for value in row.paper) if row.paper else "-")
        cells.append(line)
    return header, cells


def _by_arm(row: ComparisonRow) -> Iterator[tuple[ArmSummary, PairedComparison | None, float]]:
    """Every arm with its difference to the first and its adjusted p; the first has none."""
    yield row.arms[0], None, math.nan
    yield from zip(row.arms[1:], row.comparisons, row.p_adjusted, strict=True)


def _readable_cells_by_arm(rows: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    several_labels = len({row.label for row in rows}) > 1
    spread = len(rows[0].arms[0].run_means) > 1
    header = ["metric", *(["class"] if several_labels else []), "arm", "mean"]
    header += ["difference", "p", "p (Holm)", "better / worse / equal"]
    header += ["spread over runs"] if spread else []
    cells = []
    for row in rows:
        for arm, result, adjusted in _by_arm(row):
            line = [metric_title(row.metric), *([row.label] if several_labels else []), arm.name]
            line.append(_with_interval(row.metric, arm.mean, arm.interval))
            if result is None:
                line += ["-"] * 4
            else:
                line.append(_with_interval(row.metric, result.mean_difference, result.interval, sign=True))
                line += [_format_p(result.p_value), _format_p(adjusted)]
                line.append(f"{result.better} / {result.worse} / {result.equal}")
            line += [format_value(row.metric, arm.run_spread)] if spread else []
            cells.append(line)
    return header, cells


def _csv_cells_by_arm(rows: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    header = ["metric", "class", "arm", "mean", "low", "high", "cases", "undefined", "spread over runs"]
    header += ["difference", "difference: low", "difference: high", "p", "p (Holm)"]
    header += ["better", "worse", "equal"]
    cells = []
    for row in rows:
        for arm, result, adjusted in _by_arm(row):
            line: list[object] = [row.metric, row.label, arm.name, arm.mean]
            line += [arm.interval.low, arm.interval.high, arm.cases, arm.undefined, arm.run_spread]
            if result is None:
                line += [""] * 8
            else:
                line += [result.mean_difference, result.interval.low, result.interval.high]
                line += [result.p_value, adjusted, result.better, result.worse, result.equal]
            cells.append([str(cell) for cell in line])
    return header, cells


def _csv_cells(rows: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    header = ["metric", "class"]
    for arm in rows[0].arms:
        header += [
            f"{arm.name}: {what}"
            for what in ("mean", "low", "high", "cases", "undefined", "spread over runs")
        ]
    header += ["difference", "difference: low", "difference: high", "p", "better", "worse", "equal"]
    header += ["cases compared", "cases left out"]
    header += ["paper first", "paper last"]
    cells = []
    for row in rows:
        line: list[object] = [row.metric, row.label]
        for arm in row.arms:
            line += [arm.mean, arm.interval.low, arm.interval.high, arm.cases, arm.undefined, arm.run_spread]
        result = row.comparison
        line += [result.mean_difference, result.interval.low, result.interval.high, result.p_value]
        line += [result.better, result.worse, result.equal, result.cases, result.undefined]
        line += row.paper or ("", "")
        cells.append([str(cell) for cell in line])
    return header, cells


def _summarise(
    name: str,
    values: np.ndarray,
    runs: Sequence[CaseTable],
    metric: str,
    label: str,
    bootstrap: Mapping[str, Any],
) -> ArmSummary:
    defined = values[np.isfinite(values)]
    return ArmSummary(
        name=name,
        mean=float(defined.mean()) if len(defined) else math.nan,
        interval=bca_interval(values, **bootstrap),
        cases=len(defined),
        undefined=len(values) - len(defined),
        run_means=tuple(table.summary(label)[metric].mean for table in runs),
    )


def _with_interval(metric: str, value: float, interval: Interval, *, sign: bool = False) -> str:
    # Three decimals: the fourth is far below the width of any interval here.
    decimals = 2 if metric.endswith(("_mm", "_ml")) else 3

    def text(number: float) -> str:
        if math.isnan(number):
            return "-"
        # Adding zero turns the minus zero that rounding leaves into zero.
        return f"{round(number, decimals) + 0.0:{'+' if sign else ''}.{decimals}f}"

    return f"{text(value)} [{text(interval.low)}, {text(interval.high)}]"


def _format_p(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
