"""Training curves: the panels, the numbers behind the lines, and bad rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import pixels

from lungkit.errors import UsageError
from lungkit.report import save_curves

EPOCHS = [
    {"epoch": i, "train_loss": 1 / (i + 1), "val_dice": (1 - (i - 2) ** 2 / 8), "lr": 0.01} for i in range(4)
]


def curves_of(ax: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """What the legend names: the numbers of each line."""
    handles, labels = ax.get_legend_handles_labels()
    return {
        label: (list(line.get_xdata()), list(line.get_ydata()))
        for line, label in zip(handles, labels, strict=True)
    }


def test_curves_have_a_panel_for_each_kind_of_column(tmp_path: Path, figures: list[Figure]) -> None:
    save_curves(tmp_path / "three.png", EPOCHS, title="run")
    save_curves(tmp_path / "one.png", [{"epoch": 0, "train_loss": 1.0}])
    titles = [[ax.get_title(loc="left") for ax in figure.axes] for figure in figures]
    assert titles == [["Loss", "Metrics", "Learning rate"], ["Loss"]]
    assert {ax.get_xlabel() for ax in figures[0].axes} == {"epoch"}
    assert figures[0].get_suptitle() == "run"
    assert pixels(tmp_path / "three.png").shape[1] == 3 * pixels(tmp_path / "one.png").shape[1]


def test_lines_go_through_the_numbers(tmp_path: Path, figures: list[Figure]) -> None:
    save_curves(tmp_path / "a.png", EPOCHS)
    loss, metrics, rate = figures[0].axes
    assert curves_of(loss) == {"train loss": ([0, 1, 2, 3], [1, 1 / 2, 1 / 3, 1 / 4])}
    assert curves_of(metrics) == {"val Dice (best 1.000)": ([0, 1, 2, 3], [0.5, 0.875, 1.0, 0.875])}
    assert list(curves_of(rate).values()) == [([0, 1, 2, 3], [0.01] * 4)]


def test_the_best_validation_dice_is_marked(tmp_path: Path, figures: list[Figure]) -> None:
    save_curves(tmp_path / "a.png", EPOCHS)
    (mark,) = (line for line in figures[0].axes[1].lines if line.get_marker() == "o")
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([2], [1.0])


def test_missing_values_are_left_out(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [
        {"epoch": 0, "val_dice": None},
        {"epoch": 1, "val_dice": math.nan},
        {"epoch": 2, "val_dice": "0.5"},
    ]
    save_curves(tmp_path / "a.png", rows)
    assert curves_of(figures[0].axes[0]) == {"val Dice (best 0.500)": ([2], [0.5])}


def test_curves_of_several_runs_have_a_colour_each(tmp_path: Path, figures: list[Figure]) -> None:
    save_curves(tmp_path / "a.png", {"unet": EPOCHS, "attention-unet": EPOCHS[:2]})
    loss = figures[0].axes[0]
    assert curves_of(loss) == {
        "unet · train loss": ([0, 1, 2, 3], [1, 1 / 2, 1 / 3, 1 / 4]),
        "attention-unet · train loss": ([0, 1], [1, 1 / 2]),
    }
    assert len({line.get_color() for line in loss.lines}) == 2


def test_the_suffix_says_which_kind_of_picture(tmp_path: Path) -> None:
    save_curves(tmp_path / "a.svg", EPOCHS)
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_nothing_to_draw_names_the_columns(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seconds"):
        save_curves(tmp_path / "a.png", [{"epoch": 0, "seconds": 3.0}])


def test_row_without_epoch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="row 1"):
        save_curves(tmp_path / "a.png", [*EPOCHS[:1], {"train_loss": 1.0}])
