"""Pages of many cases stay small, sort, filter and turn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lungkit.metrics import CaseTable
from lungkit.report.html.summary_page import Summary, cards, means_table, page_link, picture


def test_ten_thousand_cases_of_long_names_stay_below_five_megabytes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [[f"<{'n' * 190}{case:05d}>", "tumour", *random.random(20)] for case in range(10_000)]
    summary = Summary("many")
    summary.rows("Cases", ["Case", "Class", *map(str, range(20))], rows, pages=[True] * len(rows))
    summary.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_numbers_are_short_and_those_that_are_not_finite_are_null() -> None:
    summary = Summary("t")
    summary.rows("Cases", ["Case", "a", "b", "c"], [["x", 1 / 3, float("nan"), 5.0]])
    ((_, _, text),) = summary.data
    assert json.loads(text)["rows"] == [["x", 0.3333, None, 5]]


def test_a_page_is_linked_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "a b.html").touch()
    written = cards({"worst": "a b", "best": "c"}, {"a b": "Dice 0.1"}, tmp_path)
    assert re.findall(r'href="([^"]*)"', written) == ["pages/a%20b.html"]


def test_a_name_that_looks_like_an_address_stays_below_the_folder() -> None:
    assert page_link("javascript:alert(1)//") == "pages/javascript%3Aalert%281%29%2F%2F.html"


def test_means_name_their_class_and_count_what_is_undefined() -> None:
    table = CaseTable()
    table.add_row("a", "tumour", {"dice": 0.5})
    table.add_row("b", "tumour", {"dice": float("nan")})
    written = means_table(table, ["dice"])
    assert 'tumour: mean</th><td class="number">0.5000' in written
    assert 'tumour: undefined</th><td class="number">1<' in written


def test_a_picture_is_inside_the_page_and_none_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    written = picture(tmp_path / "a.png", 'a "picture"')
    assert written is not None
    assert 'src="data:image/png;base64,iVBORw=="' in written
    assert picture(tmp_path / "b.png", "") is None


def test_a_section_without_parts_is_no_section() -> None:
    summary = Summary("t")
    summary.section("Empty", None)
    assert summary.parts == []


@pytest.mark.parametrize("pages", [None, [True, False]])
def test_cases_without_a_page_are_told(pages: list[bool] | None) -> None:
    summary = Summary("t")
    summary.rows("Cases", ["Case"], [["a"], ["b"]], pages=pages)
    assert json.loads(summary.data[0][2])["without"] == (None if pages is None else [1])
