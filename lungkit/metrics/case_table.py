"""Metrics of many cases: a row for each case and class, and the means with what was left out of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from lungkit.errors import UsageError
from lungkit.metrics.overlap import CaseOverlap, EmptyPolicy


@dataclass(frozen=True)
class CaseRow:
    """Metrics of one class in one case; ``decided_by_policy`` names those that the empty policy decided."""

    case_id: str
    label: str
    values: dict[str, float]
    decided_by_policy: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MetricSummary:
    """One metric over the cases; NaN is left out of every number but counted."""

    mean: float
    std: float
    """Sample standard deviation (n - 1); NaN for fewer than two cases."""
    median: float
    minimum: float
    maximum: float
    cases: int
    """Cases that the numbers above are taken over."""
    undefined: int
    """Cases that are NaN and therefore left out."""
    decided_by_policy: int
    """Cases whose value the empty policy decided, NaN or not."""


@dataclass
class CaseTable:
    """Per-case metrics and their means.

    Example:
        >>> import numpy as np
        >>> from lungkit.metrics import evaluate_case
        >>> table = CaseTable()
        >>> for case_id, truth in {"a": [0, 1, 1], "b": [1, 1, 1], "c": [0, 0, 0]}.items():
        ...     overlap = evaluate_case(np.array([0, 1, 1]) * max(truth), np.array(truth), 2)
        ...     table.add(case_id, overlap, {"background": 0, "tumour": 1})
        >>> summary = table.summary("tumour")["dice"]
        >>> summary.mean, summary.cases, summary.undefined
        (0.9, 2, 1)
    """

    empty: EmptyPolicy = EmptyPolicy.NAN
    rows: list[CaseRow] = field(default_factory=list)

    def add(self, case_id: str, overlap: CaseOverlap, labels: Mapping[str, int]) -> None:
        """Append the metrics of one case, a row for each class of ``labels`` but the background (index 0)."""
        for label, index in labels.items():
            if index == 0:
                continue
            if not 0 < index < len(overlap.counts):
                raise UsageError(
                    f"label {label!r} has index {index}, but the case was evaluated with "
                    f"{len(overlap.counts)} classes"
                )
            self.add_row(case_id, label, overlap.of_class(index), overlap.decided_in_class(index))

    def add_row(
        self,
        case_id: str,
        label: str,
        values: Mapping[str, float],
        decided_by_policy: frozenset[str] = frozenset(),
    ) -> None:
        """Append one row; every row of a table holds the same metrics."""
        if self.rows and tuple(values) != self.metrics:
            raise UsageError(f"case {case_id} has metrics {tuple(values)}, the table has {self.metrics}")
        self.rows.append(CaseRow(case_id, label, dict(values), decided_by_policy))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of the columns."""
        return tuple(self.rows[0].values) if self.rows else ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their first row."""
        return tuple(dict.fromkeys(row.label for row in self.rows))

    @property
    def case_ids(self) -> tuple[str, ...]:
        """The cases, in the order of their first row."""
        return tuple(dict.fromkeys(row.case_id for row in self.rows))

    def of_label(self, label: str) -> Iterator[CaseRow]:
        """The rows of one class."""
        return (row for row in self.rows if row.label == label)

    def column(self, metric: str, label: str) -> np.ndarray:
        """One metric of one class over the cases, float64 (N,)."""
        self._check_metric(metric)
        return np.array([row.values[metric] for row in self.of_label(label)], dtype=np.float64)

    def summary(self, label: str) -> dict[str, MetricSummary]:
        """Every metric of one class, summed up over the cases."""
        return {
            name: _summarise(
                self.column(name, label), sum(name in row.decided_by_policy for row in self.of_label(label))
            )
            for name in self.metrics
        }

    def mean(self, metric: str) -> float:
        """Mean over the classes of the mean over the cases; NaN where no case defines it.

        Example:
            >>> table = CaseTable()
            >>> table.add_row("a", "tumour", {"dice": 0.5})
            >>> table.add_row("b", "tumour", {"dice": float("nan")})
            >>> table.mean("dice")
            0.5
        """
        self._check_metric(metric)
        means = [_summarise(self.column(metric, label), 0).mean for label in self.labels]
        defined = [value for value in means if not math.isnan(value)]
        return math.fsum(defined) / len(defined) if defined else math.nan

    def _check_metric(self, metric: str) -> None:
        if metric not in self.metrics:
            raise UsageError(
                f"the table has no metric {metric!r}; it has {', '.join(self.metrics) or 'no rows'}"
            )


def _summarise(values: np.ndarray, decided_by_policy: int) -> MetricSummary:
    defined = values[~np.isnan(values)]
    undefined = len(values) - len(defined)
    if not len(defined):
        return MetricSummary(
            math.nan, math.nan, math.nan, math.nan, math.nan, 0, undefined, decided_by_policy
        )
    # An infinite distance makes mean and deviation infinite or undefined, which is what they are.
    with np.errstate(invalid="ignore"):
        std = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    return MetricSummary(
        mean=float(defined.mean()),
        std=std,
        median=float(np.median(defined)),
        minimum=float(defined.min()),
        maximum=float(defined.max()),
        cases=len(defined),
        undefined=undefined,
        decided_by_policy=decided_by_policy,
    )
