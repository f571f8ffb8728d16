"""Distributions: a panel a metric, a box and a dot for every case, and what is left out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import pixels

from lungkit.errors import UsageError
from lungkit.metrics import CaseTable
from lungkit.report import save_distributions


def dice_table(*values: float, label: str = "tumour") -> CaseTable:
    table = CaseTable()
    for case, value in enumerate(values):
        table.add_row(str(case), label, {"dice": value, "iou": value / 2})
    return table


def dots(ax: Axes) -> list[list[float]]:
    """Values of the dots, a list a group that has any."""
    return [[float(y) for y in np.asarray(drawn.get_offsets())[:, 1]] for drawn in ax.collections]


def names(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


def test_distribution_has_a_panel_for_each_metric(tmp_path: Path, figures: list[Figure]) -> None:
    table = dice_table(0.2, 0.5, 0.9)
    save_distributions(tmp_path / "one.png", table, ["dice"])
    save_distributions(tmp_path / "two.png", table, ["dice", "iou"], title="test")
    titles = [[ax.get_title(loc="left") for ax in figure.axes] for figure in figures]
    assert titles == [["Dice"], ["Dice", "IoU"]]
    assert figures[1].get_suptitle() == "test"
    assert pixels(tmp_path / "two.png").shape[1] == 2 * pixels(tmp_path / "one.png").shape[1]


def test_every_case_is_a_dot_and_the_line_is_the_median(tmp_path: Path, figures: list[Figure]) -> None:
    save_distributions(tmp_path / "a.png", dice_table(0.2, 0.5, 0.9), ["dice", "iou"])
    dice, iou = figures[0].axes
    assert (dots(dice), dots(iou)) == ([[0.2, 0.5, 0.9]], [[0.1, 0.25, 0.45]])
    medians = [line.get_ydata() for line in dice.lines if line.get_linewidth() == 2.2]
    assert [list(ends) for ends in medians] == [[0.5, 0.5]]
    means = [line.get_ydata() for line in dice.lines if line.get_marker() == "D"]
    assert [list(at) for at in means] == [[pytest.approx(1.6 / 3)]]


def test_models_stand_side_by_side(tmp_path: Path, figures: list[Figure]) -> None:
    save_distributions(tmp_path / "a.png", {"unet": dice_table(0.2), "other": dice_table(0.5, 0.7)}, ["dice"])
    (ax,) = figures[0].axes
    assert names(ax) == ["unet\nn = 1", "other\nn = 2"]
    assert dots(ax) == [[0.2], [0.5, 0.7]]
    places = [np.asarray(drawn.get_offsets())[:, 0] for drawn in ax.collections]
    assert all((abs(xs - position) < 0.2).all() for position, xs in enumerate(places, start=1))


def test_distribution_leaves_out_what_is_not_finite(tmp_path: Path, figures: list[Figure]) -> None:
    tables = {"unet": dice_table(math.nan, math.inf), "other": dice_table(0.5, math.nan)}
    save_distributions(tmp_path / "a.png", tables, ["dice"])
    (ax,) = figures[0].axes
    assert names(ax) == ["unet\nn = 0 of 2", "other\nn = 1 of 2"]
    assert dots(ax) == [[0.5]]


def test_same_numbers_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_distributions(tmp_path / name, dice_table(0.2, 0.5, 0.9), ["dice"])
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_metric_that_is_not_in_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'hd'"):
        save_distributions(tmp_path / "a.png", dice_table(0.5), ["hd"])


@pytest.mark.parametrize(("count", "boxes"), [(5, 0), (6, 1)])
def test_few_cases_are_points_without_a_box(
    tmp_path: Path, figures: list[Figure], count: int, boxes: int
) -> None:
    save_distributions(tmp_path / "a.png", dice_table(*np.linspace(0.1, 0.9, count)), ["dice"])
    (ax,) = figures[0].axes
    assert len(dots(ax)[0]) == count
    assert len(ax.patches) == boxes
    whiskers = [line for line in ax.lines if line.get_linewidth() == 1.4 and line.get_linestyle() != "None"]
    assert bool(whiskers) == bool(boxes)
