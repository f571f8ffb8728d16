"""Pages of many cases: tables that sort and filter, charts, cases to open, pictures."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np

from lungkit.metrics import CaseTable
from lungkit.report.html.charts import distribution_chart
from lungkit.report.html.markup import Markup, element, join
from lungkit.report.html.page import json_block, write_page
from lungkit.report.tables import format_value, metric_title

PAGES = "pages"
"""Folder of the pages of single scans, beside the page that lists them."""

_RATIOS = ("dice", "iou", "ppv", "sensitivity", "specificity", "volume_similarity", "nsd", "lesion_")
_DIGITS = 4  # significant ones of a number in a table: more only make the page larger
_LARGEST_PICTURE = 4 * 2**20

Cell = str | float | int | None


@dataclass
class Summary:
    """A page in the making: its parts in order, and the data of its tables."""

    title: str
    parts: list[str] = field(default_factory=list)
    data: list[tuple[str, str, str]] = field(default_factory=list)

    def section(self, title: str, *parts: str | None) -> None:
        """Add a part with a heading; without parts, nothing."""
        shown = [part for part in parts if part]
        if shown:
            self.parts.append(element("section", element("h2", title), *shown))

    def rows(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *,
        pages: Sequence[bool] | None = None,
        note: str | None = None,
    ) -> None:
        """Add a table that sorts and filters, fifty rows at a time.

        Args:
            title: heading.
            columns: headings; the first column names the case.
            rows: cells; numbers that are not finite are shown as "-".
            pages: whether a case has a page in :data:`PAGES`, a row each.
            note: below the table.
        """
        identifier = f"rows-{len(self.data)}"
        cells = [[_cell(cell) for cell in row] for row in rows]
        content = {
            "columns": [{"title": name} for name in columns],
            "rows": cells,
            "prefix": f"{PAGES}/",
            "without": [i for i, there in enumerate(pages or ()) if not there] if pages else None,
        }
        self.data.append(json_block(identifier, content))
        head = element(
            "tr", *(element("th", element("button", name, type="button"), scope="col") for name in columns)
        )
        search = element(
            "input",
            type="search",
            placeholder="Filter: a name, or e.g. dice<0.5",
            aria_label=f"Filter {title}",
        )
        controls = element(
            "div",
            search,
            element("button", "Previous", type="button", data_turn=-1),
            element("button", "Next", type="button", data_turn=1),
            element("span", class_="count", role="status"),
            class_="controls",
        )
        table = element("table", element("thead", head), element("tbody"))
        self.section(
            title,
            element("div", controls, element("div", table, class_="scroll"), data_rows=identifier),
            element("noscript", element("p", "The rows of this table need JavaScript.")),
            element("p", note, class_="note") if note else None,
        )

    def write(self, path: str | os.PathLike[str], *, subtitle: str | None = None) -> None:
        """Write the page; arguments and errors are those of :func:`write_page`."""
        head = element("header", element("h1", self.title), element("p", subtitle) if subtitle else None)
        write_page(
            path, self.title, [head, element("main", *self.parts)], scripts=("tables.js",), data=self.data
        )


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A short table as it is: the first column names the row, the others are aligned to the right."""
    head = element(
        "tr", *(element("th", name, class_="number" if at else None) for at, name in enumerate(header))
    )
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_="number") for cell in row[1:]),
        )
        for row in rows
    ]
    return element("div", element("table", element("thead", head), element("tbody", *lines)), class_="scroll")


def means_table(table: CaseTable, metrics: Sequence[str]) -> Markup:
    """Mean, standard deviation and median of every metric, a row a class."""
    rows = []
    for label in table.labels:
        summary = table.summary(label)
        for name, of in (("mean", "mean"), ("std", "std"), ("median", "median")):
            rows.append(
                [
                    f"{label}: {name}",
                    *(format_value(metric, getattr(summary[metric], of)) for metric in metrics),
                ]
            )
        if any(summary[metric].undefined for metric in metrics):
            rows.append([f"{label}: undefined", *(str(summary[metric].undefined) for metric in metrics)])
    return plain_table(["", *map(metric_title, metrics)], rows)


def distributions(tables: Mapping[str, CaseTable], metrics: Sequence[str]) -> Markup:
    """A chart a metric, in it a group for every table and class."""
    several = len({label for table in tables.values() for label in table.labels}) > 1
    charts = []
    for metric in metrics:
        groups = {
            " · ".join(filter(None, [name, label if several or not name else ""])): table.column(
                metric, label
            )
            for name, table in tables.items()
            for label in table.labels
        }
        limits = (0.0, 1.0) if metric.startswith(_RATIOS) else None
        charts.append(distribution_chart(metric_title(metric), groups, limits=limits))
    return element("div", *charts, class_="charts")


def cards(cases: Mapping[str, str], texts: Mapping[str, str], pages: Path) -> Markup:
    """Cases that were picked, by what they stand for: worst, median, best; a link where they have a page."""
    shown = []
    for rank, case_id in cases.items():
        there = (pages / f"{case_id}.html").is_file()
        name = element("a", case_id, href=page_link(case_id)) if there else Markup(join(case_id))
        shown.append(
            element(
                "div",
                element("h3", rank.capitalize()),
                element("p", name),
                element("p", texts.get(case_id, ""), class_="note"),
                class_="card",
            )
        )
    return element("div", *shown, class_="picked")


def page_link(name: str) -> str:
    """Address of the page of a scan, from the page that lists it.

    Example:
        >>> page_link("a b?c")
        'pages/a%20b%3Fc.html'
    """
    return f"{PAGES}/{quote(os.fsencode(name), safe='')}.html"


def picture(path: Path, description: str) -> Markup | None:
    """A PNG inside the page; None where there is none, or too large a one."""
    if not path.is_file() or path.stat().st_size > _LARGEST_PICTURE:
        return None
    text = base64.b64encode(path.read_bytes()).decode("ascii")
    image = element("img", src=f"data:image/png;base64,{text}", alt=description)
    return element("figure", image, element("figcaption", description), class_="picture")


def _cell(cell: Cell) -> Cell:
    if cell is None or isinstance(cell, (str, bool)):
        return cell
    value = float(cell)
    if not math.isfinite(value):
        return None
    if value.is_integer() and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.{_DIGITS}g}")


def case_rows(table: CaseTable, metrics: Sequence[str]) -> list[list[Cell]]:
    """Rows of a table of cases: case, class, metrics."""
    return [
        [row.case_id, row.label, *(row.values.get(name, np.nan) for name in metrics)] for row in table.rows
    ]
