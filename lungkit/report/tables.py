"""Tables of metrics: plain text for a terminal, Markdown and LaTeX for a page, CSV and JSON for a program."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lungkit._atomic import write_json_atomic, write_text_atomic
from lungkit._text import csv_cell, markdown, printable
from lungkit.errors import UsageError
from lungkit.metrics import CaseTable, EmptyPolicy, MetricSummary

_TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "ppv": "PPV",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "volume_similarity": "Volume similarity",
    "assd_pooled_mm": "ASSD pooled (mm)",
    "lesion_f1": "Lesion F1",
    "lesion_dice": "Lesion Dice",
    "readers_dice": "Readers' Dice",
    "other_readers_dice": "Readers' Dice, own vote out",
}
_PATTERNS = (
    (re.compile(r"hd([\d.]+)_(\w+)_mm"), r"HD\1 \2 (mm)"),
    (re.compile(r"nsd_(\w+)_([\d.]+)mm"), r"NSD \1 (\2 mm)"),
    (re.compile(r"(\w+)_(mm|ml)"), r"\1 (\2)"),
)
_MANY_CASES = 20
_COUNTS = ("tp", "fp", "fn", "lesions_true", "lesions_found", "lesions_predicted", "lesions_false")


def metric_title(name: str) -> str:
    """Heading of a metric's column; the definition of a distance stays in it.

    Example:
        >>> metric_title("ppv"), metric_title("hd95_directed_mm"), metric_title("nsd_voxel_2mm")
        ('PPV', 'HD95 directed (mm)', 'NSD voxel (2 mm)')
    """
    if name in _TITLES:
        return _TITLES[name]
    for pattern, title in _PATTERNS:
        if pattern.fullmatch(name):
            return (
                pattern.sub(title, name)
                .replace("_", " ")
                .replace("diameter", "Diameter")
                .replace("volume", "Volume")
            )
    return name.replace("_", " ").capitalize() if name.startswith("lesion") else name


def format_value(name: str, value: float) -> str:
    """A metric as text: ratios with four decimals, millimetres and millilitres with two, NaN as "-".

    Example:
        >>> format_value("dice", 0.81236), format_value("assd_pooled_mm", 1.5), format_value("ppv", float("nan"))
        ('0.8124', '1.50', '-')
    """
    if math.isnan(value):
        return "-"
    if name in _COUNTS and value.is_integer():
        return str(int(value))
    return f"{value:.2f}" if name.endswith(("_mm", "_ml")) or name in _COUNTS else f"{value:.4f}"


def format_rows(header: Sequence[str], rows: Sequence[Sequence[str]], *, style: str = "text") -> str:
    """Lay out cells as a table; ``style`` is "text", "markdown", "latex" or "csv".

    Columns whose cells all look like numbers (or "-") are aligned to the right.

    Raises:
        UsageError: an unknown style, or a row whose length differs from the header's.

    Example:
        >>> print(format_rows(["case", "Dice"], [["lung_001", "0.81"], ["lung_02", "-"]]))
        case      Dice
        --------  ----
        lung_001  0.81
        lung_02      -
    """
    if style not in _STYLES:
        raise UsageError(f"style must be one of {', '.join(_STYLES)}, got {style!r}")
    for row in rows:
        if len(row) != len(header):
            raise UsageError(f"row {list(row)} has {len(row)} cells, the header has {len(header)}")
    return _STYLES[style](header, rows)


def format_case_table(
    table: CaseTable,
    *,
    style: str = "text",
    cases: bool = True,
    worst: int | None = None,
    metrics: Sequence[str] | None = None,
) -> str:
    """Per-case metrics, then for each class the mean, the standard deviation and what was left out.

    Args:
        table: the metrics.
        style: "text", "markdown" or "latex".
        cases: whether the rows of single cases are shown.
        worst: where there are more than 20 cases, only so many are shown, of the lowest first metric.
        metrics: the columns; all metrics where not given.

    Example:
        >>> table = CaseTable()
        >>> table.add_row("lung_001", "tumour", {"dice": 0.75})
        >>> table.add_row("lung_002", "tumour", {"dice": float("nan")}, frozenset({"dice"}))
        >>> print(format_case_table(table))
        case       label     Dice
        ---------  ------  ------
        lung_001   tumour  0.7500
        lung_002   tumour       -
        mean       tumour  0.7500
        std        tumour       -
        undefined  tumour       1
        <BLANKLINE>
        2 cases. Undefined values ("-") are left out of the means. Empty masks: policy "nan" decided 1 value in 1 case.
    """
    shown = table.metrics if metrics is None else tuple(metrics)
    header = ["case", "label", *map(metric_title, shown)]
    rows = []
    chosen = _worst(table, shown[0], worst) if worst and len(table.case_ids) > _MANY_CASES else None
    for row in table.rows if cases else ():
        if chosen is None or row.case_id in chosen:
            rows.append([row.case_id, row.label, *(format_value(name, row.values[name]) for name in shown)])
    for label in table.labels:
        every = table.summary(label)
        summary = {name: every[name] for name in shown}
        rows.append(["mean", label, *(format_value(name, s.mean) for name, s in summary.items())])
        rows.append(["std", label, *(format_value(name, s.std) for name, s in summary.items())])
        if any(s.undefined for s in summary.values()):
            rows.append(["undefined", label, *(str(s.undefined) for s in summary.values())])
    text = f"{format_rows(header, rows, style=style)}\n\n{policy_note(table)}"
    if chosen is None or not cases:
        return text
    shown_cases = f"{_count(len(chosen), 'case')} of the lowest {metric_title(shown[0])}"
    return f"{text}\nShown: the {shown_cases}; the files hold all."


def _worst(table: CaseTable, metric: str, count: int) -> list[str]:
    """The cases of the lowest ``metric``, by the lowest of their classes; undefined ones last, ties by name."""
    lowest: dict[str, float] = {}
    for row in table.rows:
        value = row.values[metric]
        lowest[row.case_id] = min(lowest.get(row.case_id, math.inf), math.inf if math.isnan(value) else value)
    return sorted(lowest, key=lambda case_id: (lowest[case_id], case_id))[:count]


def policy_note(table: CaseTable) -> str:
    """One sentence on the empty policy and how much of the table it decided."""
    values = sum(len(row.decided_by_policy) for row in table.rows)
    cases = len({row.case_id for row in table.rows if row.decided_by_policy})
    return (
        f"{_count(len(table.case_ids), 'case')}. "
        'Undefined values ("-") are left out of the means. '
        f'Empty masks: policy "{table.empty.value}" decided {_count(values, "value")} in {_count(cases, "case")}.'
    )


def case_table_to_dict(table: CaseTable) -> dict[str, Any]:
    """The table as JSON knows it: NaN is None, infinity the string "inf"."""
    return {
        "empty_policy": table.empty.value,
        "cases": [
            {
                "case": row.case_id,
                "label": row.label,
                **_json_numbers(row.values),
                "decided_by_policy": sorted(row.decided_by_policy),
            }
            for row in table.rows
        ],
        "summary": {
            label: {name: _json_numbers(asdict(s)) for name, s in table.summary(label).items()}
            for label in table.labels
        },
    }


def case_table_from_dict(content: Mapping[str, Any]) -> CaseTable:
    """The table that :func:`case_table_to_dict` gave, digit for digit.

    Raises:
        KeyError, TypeError, ValueError: it is none.

    Example:
        >>> table = CaseTable()
        >>> table.add_row("a", "tumour", {"dice": 0.1 + 0.2, "hd95_directed_mm": math.inf})
        >>> case_table_from_dict(case_table_to_dict(table)) == table
        True
    """
    table = CaseTable(empty=EmptyPolicy(content["empty_policy"]))
    for row in content["cases"]:
        values = {
            name: math.nan if value is None else float(value)
            for name, value in row.items()
            if name not in ("case", "label", "decided_by_policy")
        }
        table.add_row(row["case"], row["label"], values, frozenset(row["decided_by_policy"]))
    return table


def write_case_table(
    folder: str | os.PathLike[str],
    table: CaseTable,
    *,
    name: str = "metrics",
    metrics: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a table as ``name.csv`` (cases), ``name_summary.csv``, ``name.json``, ``name.md`` and ``name.txt``.

    Args:
        folder: an existing folder; files of these names in it are replaced, each whole or not at all.
        table: the metrics.
        name: stem of the files.
        metrics: the columns of the two readable files; CSV and JSON hold all metrics.
        notes: lines below the table in the readable files, e.g. definitions.
        extra: further entries of the JSON file, e.g. definitions and versions.

    Raises:
        ResourceError: the disk is full.
        UsageError: the folder cannot be written.
    """
    folder = Path(folder)
    write_text_atomic(folder / f"{name}.csv", _cases_csv(table))
    write_text_atomic(folder / f"{name}_summary.csv", _summary_csv(table))
    write_json_atomic(folder / f"{name}.json", {**(extra or {}), **case_table_to_dict(table)})
    for suffix, style, bullet in ((".md", "markdown", "- "), (".txt", "text", "")):
        lines = [
            format_case_table(table, style=style, metrics=metrics),
            "",
            *(bullet + (markdown(note) if style == "markdown" else printable(note)) for note in notes),
        ]
        write_text_atomic(folder / f"{name}{suffix}", "\n".join(lines).rstrip() + "\n")


def _cases_csv(table: CaseTable) -> str:
    rows = [
        [
            row.case_id,
            row.label,
            *(repr(value) for value in row.values.values()),
            " ".join(sorted(row.decided_by_policy)),
        ]
        for row in table.rows
    ]
    return _csv(["case", "label", *table.metrics, "decided_by_policy"], rows)


def _summary_csv(table: CaseTable) -> str:
    rows = [
        [label, metric, *(repr(value) for value in asdict(summary).values())]
        for label in table.labels
        for metric, summary in table.summary(label).items()
    ]
    return _csv(["label", "metric", *MetricSummary.__dataclass_fields__], rows)


def _json_numbers(values: Mapping[str, float]) -> dict[str, float | str | None]:
    return {
        name: None if math.isnan(value) else str(value) if math.isinf(value) else value
        for name, value in values.items()
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _is_number(cell: str) -> bool:
    try:
        float(cell.split(" ")[0].rstrip("%"))
    except ValueError:
        return cell in {"-", ""}
    return True


def _numeric_columns(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    return [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(columns)]


def _text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header, rows = [printable(cell) for cell in header], [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    numeric = _numeric_columns(rows, len(header))

    def line(cells: Sequence[str]) -> str:
        aligned = zip(cells, widths, numeric, strict=True)
        return "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in aligned).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---:" if right else "---" for right in _numeric_columns(rows, len(header))]
    return "\n".join("| " + " | ".join(map(markdown, row)) + " |" for row in (header, rule, *rows))


def _latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = "".join("r" if right else "l" for right in _numeric_columns(rows, len(header)))
    lines = [" & ".join(map(_latex_cell, row)) + r" \\" for row in (header, *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def _latex_cell(cell: str) -> str:
    return "--" if cell == "-" else "".join(_LATEX.get(letter, letter) for letter in cell)


# The signs of comparison are other letters in LaTeX's text fonts.
_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def _csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([[csv_cell(cell) for cell in row] for row in (header, *rows)])
    return buffer.getvalue()


_STYLES: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], str]] = {
    "text": _text,
    "markdown": _markdown,
    "latex": _latex,
    "csv": _csv,
}
