"""``report.html`` of a folder that a command wrote: predictions, an evaluation, a training run, a comparison."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungkit._reading import read_json, read_text
from lungkit._text import from_csv_cell
from lungkit.errors import DataError, LungkitError
from lungkit.metrics import CaseTable
from lungkit.pipeline.labelled import representative_cases
from lungkit.pipeline.records import read_records
from lungkit.report import format_value, metric_title
from lungkit.report.html import charts
from lungkit.report.html.markup import Markup, element, join
from lungkit.report.html.page import check_ours
from lungkit.report.html.summary_page import (
    PAGES,
    Summary,
    cards,
    case_rows,
    distributions,
    means_table,
    picture,
    plain_table,
)

REPORT = "report.html"

_CHARTS = 8  # distributions of as many metrics; the tables hold all
_HEADLINES = ("dice", "iou", "ppv", "sensitivity", "lesion_f1")
_HEADLINE_BEGINNINGS = ("hd", "nsd", "assd")


def write_folder_report(folder: Path) -> Path:
    """Write ``report.html`` into a folder of results from the files that are in it; returns its path.

    Cases are linked to their pages in ``pages/`` where these are there.

    Raises:
        DataError: the folder holds no results of lungkit, or damaged ones.
        UsageError: ``report.html`` there is not lungkit's.
    """
    kind = kind_of(folder)
    if kind is None:
        raise DataError(
            f"{folder}: holds no results of lungkit; expected a folder of lungkit-predict (results.jsonl), "
            "lungkit-evaluate (metrics.json), lungkit-train (metrics.csv, config.yaml) or lungkit-compare "
            "(comparison.json)"
        )
    path = folder / REPORT
    check_ours(path)
    try:
        summary = _KINDS[kind](folder)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        if isinstance(error, LungkitError):
            raise
        # Its files are small, and of as many kinds as the commands that write them.
        raise DataError(
            f"{folder}: its files are not as lungkit wrote them ({type(error).__name__}: {error}); run the command "
            "again"
        ) from error
    summary.write(path)
    return path


def kind_of(folder: Path) -> str | None:
    """Which command wrote a folder: "predictions", "comparison", "run", "evaluation"; None for no command of ours."""
    if not folder.is_dir():
        return None
    if (folder / "prediction.json").is_file() or any(folder.glob("results*.jsonl")):
        return "predictions"
    if (folder / "comparison.json").is_file():
        return "comparison"
    if (folder / "config.yaml").is_file() and (folder / "metrics.csv").is_file():
        return "run"
    if (folder / "metrics.json").is_file():
        return "evaluation"
    if (folder / PAGES).is_dir():  # of masks that lungkit-predict did not write
        return "predictions"
    return None


def read_case_table(path: Path) -> CaseTable:
    """The table of cases in a ``.csv`` that :func:`lungkit.report.write_case_table` wrote.

    Raises:
        DataError: it cannot be read as one.
    """
    table = CaseTable()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                case_id, label = from_csv_cell(row.pop("case")), from_csv_cell(row.pop("label"))
                decided = frozenset((row.pop("decided_by_policy", "") or "").split())
                table.add_row(case_id, label, {name: float(cell) for name, cell in row.items()}, decided)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{path}: not a table of cases ({type(error).__name__}: {error})") from error
    return table


def _predictions(folder: Path) -> Summary:
    there = _pages(folder)
    rows = read_records(folder)
    known = {row["scan"] for row in rows}
    rows += [{"scan": name, "status": "ok"} for name in sorted(there - known)]
    summary = Summary(f"Predictions: {len(rows)} scan{'' if len(rows) == 1 else 's'}")
    classes = sorted({name for row in rows for name in row.get("classes", {})})
    columns = ["Scan", "Status"]
    for name in classes:
        columns += [f"{name}: volume (ml)", f"{name}: longest (mm)", f"{name}: lesions"]
    cells: list[list[Any]] = []
    for row in rows:
        found = row.get("classes", {})
        status = row.get("status", "")
        line = [row["scan"], status if status == "ok" else f"{status}: {row.get('error', '')}"]
        for name in classes:
            measured = found.get(name, {})
            line += [measured.get(key) for key in ("volume_ml", "longest_diameter_mm", "lesions")]
        cells.append([*line, row.get("seconds")])
    failed = sum(row.get("status") != "ok" for row in rows)
    if failed:
        summary.parts.append(
            element("p", f"{failed} of {len(rows)} scans failed; the table says why.", class_="warning")
        )
    summary.rows("Scans", [*columns, "Seconds"], cells, pages=[row["scan"] in there for row in rows])
    drawn = []
    for name in classes:
        for key, title in (("volume_ml", "volume (ml)"), ("lesions", "lesions in a scan")):
            values = [row["classes"][name].get(key) for row in rows if name in row.get("classes", {})]
            drawn.append(charts.distribution_chart(f"{name}: {title}", {name: np.asarray(values, float)}))
    summary.section("Distributions", element("div", *drawn, class_="charts") if drawn else None)
    return summary


def _evaluation(folder: Path) -> Summary:
    content = _json(folder / "metrics.json")
    table = read_case_table(folder / "metrics.csv")
    summary = Summary(f"Evaluation: {len(table.case_ids)} case{'' if len(table.case_ids) == 1 else 's'}")
    failed = content.get("failed") or {}
    for case_id, message in list(failed.items())[:20]:
        summary.parts.append(element("p", f"{case_id} was not measured: {message}", class_="warning"))
    if len(failed) > 20:
        summary.parts.append(element("p", f"{len(failed) - 20} more were not measured.", class_="warning"))
    _measured(summary, folder, table, content.get("definitions") or {})
    _calibration(summary, folder)
    return summary


def _run(folder: Path) -> Summary:
    summary = Summary(f"Training run {folder.resolve().name}")
    state = _json(folder / "status.json").get("state") if (folder / "status.json").is_file() else None
    if state in ("interrupted", "failed"):
        summary.parts.append(element("p", f"The run is {state}.", class_="warning"))
    if (folder / "validation.csv").is_file():
        content = _json(folder / "validation.json")
        _measured(
            summary, folder, read_case_table(folder / "validation.csv"), content.get("definitions") or {}
        )
    _curves(summary, {"": folder})
    _calibration(summary, folder)
    _pictures(summary, "Overlays", folder / "overlays")
    summary.section(
        "Augmentation",
        picture(folder / "augmentation.png", "Training patches, and what augmentation makes of them"),
    )
    summary.section("Configuration", _file(folder / "config.yaml"))
    return summary


def _comparison(folder: Path) -> Summary:
    content = _json(folder / "comparison.json")
    runs: dict[str, list[str]] = content.get("runs") or {}
    summary = Summary(f"Comparison: {', '.join(runs)}")
    rows = _csv(folder / "table.csv")
    arms = [name for name in runs if rows and f"{name}: mean" in rows[0]]
    header = ["Metric", *arms, "Difference", "p", "Better / worse / equal"]
    several = len({row["class"] for row in rows}) > 1
    lines, forest = [], []
    for row in rows:
        metric = row["metric"]
        name = metric_title(metric) + (f", {row['class']}" if several else "")
        of_arms = [
            _interval(metric, *(row[f"{arm}: {of}"] for of in ("mean", "low", "high"))) for arm in arms
        ]
        difference = _interval(metric, row["difference"], row["difference: low"], row["difference: high"])
        votes = " / ".join(row[key] for key in ("better", "worse", "equal"))
        lines.append([name, *of_arms, difference, _p(row["p"]), votes])
        if not metric.endswith(("_mm", "_ml")):
            values = [_float(row[key]) for key in ("difference", "difference: low", "difference: high")]
            forest.append((name, values[0], values[1], values[2], difference))
    notes = element("ul", *(element("li", note) for note in content.get("notes") or ()), class_="note")
    summary.section("Result", plain_table(header, lines), notes)
    if forest and len(arms) > 1:
        title = f"Difference: {arms[-1]} minus {arms[0]}, paired by case, 95 % interval"
        chart = charts.forest_chart(title, forest, "ratios; zero is no difference")
        summary.section("Forest plot", element("div", chart, class_="charts"))
    tables = _tables_of_arms(folder, runs)
    if tables:
        shown = _headlines(next(iter(tables.values())))
        first = representative_cases(
            {name: table for name, table in tables.items() if "dice" in table.metrics}
        )
        _picked(summary, folder, first, tables)
        summary.section("Distributions over the cases", distributions(tables, shown[:_CHARTS]))
        _rows_of_tables(summary, folder, tables, shown)
    _curves(
        summary,
        {
            name: folder / "runs" / Path(paths[0]).name if not Path(paths[0]).is_dir() else Path(paths[0])
            for name, paths in runs.items()
            if paths
        },
    )
    _pictures(summary, "Overlays", folder / "overlays")
    return summary


_KINDS: dict[str, Callable[[Path], Summary]] = {
    "predictions": _predictions,
    "evaluation": _evaluation,
    "run": _run,
    "comparison": _comparison,
}


def _measured(summary: Summary, folder: Path, table: CaseTable, definitions: Mapping[str, str]) -> None:
    """Means, picked cases, distributions, all cases."""
    if not table.rows:
        summary.parts.append(element("p", "No case was measured.", class_="warning"))
        return
    shown = _headlines(table)
    summary.section("Means over the cases", means_table(table, shown))
    if "dice" in table.metrics:
        _picked(summary, folder, representative_cases({"": table}), {"": table})
    summary.section("Distributions over the cases", distributions({"": table}, shown[:_CHARTS]))
    _rows_of_tables(summary, folder, {"": table}, table.metrics)
    said = [
        join(element("dt", metric_title(name)), element("dd", text)) for name, text in definitions.items()
    ]
    if said:
        summary.section(
            "Definitions", element("details", element("summary", "Of every metric"), element("dl", *said))
        )


def _picked(
    summary: Summary, folder: Path, picked: Mapping[str, str], tables: Mapping[str, CaseTable]
) -> None:
    texts = {
        case_id: "Dice "
        + ", ".join(
            f"{name} {format_value('dice', row.values['dice'])}".strip()
            for name, table in tables.items()
            for row in table.rows
            if row.case_id == case_id and row.label == table.labels[0]
        )
        for case_id in picked.values()
    }
    summary.section(
        "Worst, median and best case by Dice", cards(picked, texts, folder / PAGES) if picked else None
    )


def _rows_of_tables(
    summary: Summary, folder: Path, tables: Mapping[str, CaseTable], metrics: Sequence[str]
) -> None:
    there = _pages(folder)
    named = len(tables) > 1
    rows = [
        [row[0], *([name] if named else []), *row[1:]]
        for name, table in tables.items()
        for row in case_rows(table, metrics)
    ]
    columns = ["Case", *(["Model"] if named else []), "Class", *map(metric_title, metrics)]
    summary.rows("Cases", columns, rows, pages=[str(row[0]) in there for row in rows])


def _pages(folder: Path) -> set[str]:
    """Scans that have a page."""
    return {path.name.removesuffix(".html") for path in (folder / PAGES).glob("*.html")}


def _headlines(table: CaseTable) -> list[str]:
    found = [name for name in table.metrics if name in _HEADLINES or name.startswith(_HEADLINE_BEGINNINGS)]
    return found or list(table.metrics)


def _tables_of_arms(folder: Path, runs: Mapping[str, Sequence[str]]) -> dict[str, CaseTable]:
    """The cases of the first run of every arm; where there is a file of it."""
    tables = {}
    for name, paths in runs.items():
        found = sorted((folder / "cases").glob("*.csv"))
        wanted = Path(paths[0]).name if paths else ""
        match = [
            path
            for path in found
            if path.stem == wanted
            or (path.stem.partition("-")[2] == wanted and path.stem.split("-")[0].isdigit())
        ]
        if match:
            tables[name] = read_case_table(match[0])
    return tables


def _curves(summary: Summary, runs: Mapping[str, Path]) -> None:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {
        "Loss": {},
        "Validation": {},
        "Learning rate": {},
    }
    for name, run in runs.items():
        if not (run / "metrics.csv").is_file():
            continue
        rows = _csv(run / "metrics.csv")
        for column in rows[0] if rows else ():
            panel = next(
                (
                    title
                    for title, mark in (
                        ("Loss", "loss"),
                        ("Validation", "val_"),
                        ("Learning rate", "learning_rate"),
                    )
                    if mark in column
                ),
                None,
            )
            points = [(_float(row["epoch"]), _float(row[column])) for row in rows]
            if panel is not None and any(math.isfinite(y) for _, y in points):
                title = (
                    metric_title(column.removeprefix("val_"))
                    if panel == "Validation"
                    else column.replace("_", " ")
                )
                # Of several runs the Dice alone: more lines than that cannot be told apart.
                if len(runs) == 1 or panel != "Validation" or column == "val_dice":
                    panels[panel][" · ".join(filter(None, [name, title]))] = points
    drawn = [
        charts.curve_chart(title, series, limits=(0.0, 1.0) if title == "Validation" else None)
        for title, series in panels.items()
        if series
    ]
    summary.section("Training", element("div", *drawn, class_="charts") if drawn else None)


def _calibration(summary: Summary, folder: Path) -> None:
    path = folder / "calibration.json"
    if not path.is_file():
        return
    content = _json(path)
    regions = content.get("regions") or {}
    drawn = []
    for name, seen in (content.get("classes") or {}).items():
        for region, one in seen.items():
            curve = one["curve"]
            bins = list(zip(curve["predicted"], curve["observed"], curve["voxels"], strict=True))
            drawn.append(
                charts.calibration_chart(f"{name}, {regions.get(region, region)}", bins, error=one.get("ece"))
            )
    summary.section("Calibration", element("div", *drawn, class_="charts") if drawn else None)


def _pictures(summary: Summary, title: str, folder: Path) -> None:
    found = [picture(path, path.stem) for path in sorted(folder.glob("*.png"))[:12]]
    summary.section(title, *found)


def _file(path: Path) -> Markup | None:
    if not path.is_file():
        return None
    text = read_text(path, errors="replace")
    return element("details", element("summary", path.name), element("pre", text))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no JSON object")
    return content


def _csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {
                    from_csv_cell(name): from_csv_cell(cell or "")
                    for name, cell in row.items()
                    if name is not None
                }
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error})") from error


def _float(cell: str | None) -> float:
    try:
        return float(cell) if cell else math.nan
    except ValueError:
        return math.nan


def _interval(metric: str, value: str, low: str, high: str) -> str:
    # Adding zero turns the minus zero that rounding leaves into zero.
    texts = [format_value(metric, round(_float(cell), 4) + 0.0) for cell in (value, low, high)]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _p(cell: str) -> str:
    p = _float(cell)
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
