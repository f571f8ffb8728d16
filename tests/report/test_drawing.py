"""What the pictures of a case share: the part of a slice that is shown, outlines, scale bars."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from pictures import edge_of, outlines

from lungkit.metrics import CaseTable
from lungkit.report import save_curves, save_distributions, save_overlays, save_preview
from lungkit.report._drawing import crop_box, draw_contours, draw_scale_bar


def mask_of(shape: tuple[int, ...], *boxes: tuple[slice, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for box in boxes:
        mask[box] = True
    return mask


def test_crop_holds_the_foreground_and_is_square() -> None:
    rows, columns = crop_box(mask_of((200, 300), np.s_[190:200, 20:45]))
    assert rows.start <= 190 and rows.stop == 200
    assert columns.start <= 20 and columns.stop >= 45
    assert rows.stop - rows.start == columns.stop - columns.start


@pytest.mark.parametrize("mask", [mask_of((64, 64)), mask_of((64, 64), np.s_[4:60, 4:60])])
def test_nothing_is_cropped_without_foreground_or_with_much_of_it(mask: np.ndarray) -> None:
    assert crop_box(mask) == (slice(0, 64), slice(0, 64))


def test_the_outline_of_a_mask_at_the_border_is_closed() -> None:
    ax, mask = Figure().subplots(), mask_of((8, 8), np.s_[0:3, 5:8])
    draw_contours(ax, mask.astype(int), colours=("#ff0000",), width=1.0)
    (outline,) = outlines(ax)
    assert (outline.rows, outline.columns) == edge_of(mask)


@pytest.mark.parametrize(("width", "spacing", "label"), [(100, 0.5, "20 mm"), (512, 0.7, "100 mm")])
def test_the_scale_bar_is_the_longest_that_fits(width: int, spacing: float, label: str) -> None:
    ax = Figure().subplots()
    draw_scale_bar(ax, (slice(0, 64), slice(0, width)), (1.0, spacing))
    assert [text.get_text() for text in ax.texts] == [label]
    assert np.ptp(ax.lines[0].get_xdata()) == pytest.approx(float(label.split()[0]) / spacing)


def test_no_scale_bar_is_drawn_where_none_fits() -> None:
    ax = Figure().subplots()
    draw_scale_bar(ax, (slice(0, 64), slice(0, 10)), (1.0, 1.0))
    assert not ax.texts and not ax.lines


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, lungkit.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


NAME = "c$0_{$"  # in matplotlib's eyes a formula, and a broken one


def test_names_from_outside_are_no_formulas(tmp_path: Path, figures: list[Figure]) -> None:
    volume = np.zeros((3, 64, 64), np.uint8)
    volume[1, 20:30, 20:30] = 1
    save_preview(
        tmp_path / "1.png",
        volume.astype(np.int16),
        volume,
        (1, 1, 1),
        window=(0, 1),
        title=NAME,
        legend={1: NAME},
    )
    save_overlays(tmp_path / "2.png", volume.astype(np.int16), volume, {NAME: volume}, title=NAME)
    save_curves(
        tmp_path / "3.png", {NAME: [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]}, title=NAME
    )
    table = CaseTable()
    table.add_row("a", NAME, {"dice": 0.5})
    save_distributions(tmp_path / "4.png", table, ["dice"], title=NAME)
    for figure in figures:
        shown = [text for text in figure.findobj(Text) if NAME in text.get_text()]
        assert shown and not any(text.get_parse_math() for text in shown)
