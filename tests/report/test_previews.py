"""The picture of a predicted scan: its planes, the outlines in them, and the part that is enlarged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pictures import Outline, edge_of, image_of, outlines, shows

from lungkit.errors import UsageError
from lungkit.report.previews import save_preview

RED, BLUE = "#ff6b4a", "#4aa8ff"
SPACING_MM = (2.5, 0.8, 0.8)
WINDOW = (-1000, 400)


def scan_of(mask: np.ndarray) -> np.ndarray:
    return np.where(mask != 0, 40, -800).astype(np.int16)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((20, 90, 100), np.uint8)
    mask[4:7, 30:40, 60:75] = 1
    mask[5, 28:42, 60:75] = 1  # the axial slice with most of it
    return mask


def test_three_planes_through_the_foreground_and_its_surroundings(
    tmp_path: Path, figures: list[Figure], mask: np.ndarray
) -> None:
    save_preview(tmp_path / "a.png", scan_of(mask), mask, SPACING_MM, window=WINDOW, title="a")
    axes = figures[0].axes
    assert [ax.get_title() for ax in axes] == [
        "axial, slice 6 of 20",
        "coronal, slice 31 of 90",
        "sagittal, slice 61 of 100",
        "axial, enlarged",
    ]
    assert [image_of(ax).shape for ax in axes] == [(90, 100), (20, 100), (20, 90), (48, 48)]
    assert figures[0].get_suptitle() == "a"


def test_outlines_lie_round_what_they_outline(
    tmp_path: Path, figures: list[Figure], mask: np.ndarray
) -> None:
    save_preview(tmp_path / "a.png", scan_of(mask), mask, SPACING_MM, window=WINDOW)
    for ax in figures[0].axes:
        assert outlines(ax) == [Outline(RED, False, *edge_of(image_of(ax) == 40))]


def test_the_file_shows_the_outline(tmp_path: Path, figures: list[Figure], mask: np.ndarray) -> None:
    path = tmp_path / "a.png"
    save_preview(path, scan_of(mask), mask, SPACING_MM, window=WINDOW)
    ax = figures[0].axes[-1]
    (outline,) = outlines(ax)
    assert shows(path, ax, sum(outline.rows) / 2, outline.columns[0], RED)


def test_the_enlarged_part_is_framed_in_the_axial_slice(
    tmp_path: Path, figures: list[Figure], mask: np.ndarray
) -> None:
    save_preview(tmp_path / "a.png", scan_of(mask), mask, SPACING_MM, window=WINDOW)
    axial, enlarged = figures[0].axes[0], figures[0].axes[-1]
    (frame,) = (patch for patch in axial.patches if isinstance(patch, Rectangle))
    left, top = int(frame.get_x() + 0.5), int(frame.get_y() + 0.5)
    assert np.array_equal(image_of(axial)[top : top + 48, left : left + 48], image_of(enlarged))


def test_planes_are_seen_front_up_head_up_and_patients_right_on_the_left(
    tmp_path: Path, figures: list[Figure]
) -> None:
    scan = np.zeros((4, 6, 8), np.int16)
    scan[2, 5, 4] = 1  # front, in the middle slice across z
    scan[3, 3, 7] = 2  # head and right, in the middle coronal slice
    scan[3, 5, 4] = 3  # head and front, in the middle sagittal slice
    save_preview(tmp_path / "a.png", scan, scan * 0, (1, 1, 1), window=(0, 3))
    axial, coronal, sagittal = (image_of(ax) for ax in figures[0].axes)
    assert axial[0, 3] == 1
    assert coronal[0, 0] == 2
    assert sagittal[0, 0] == 3


def test_without_foreground_the_middle_is_shown_and_nothing_outlined(
    tmp_path: Path, figures: list[Figure]
) -> None:
    mask = np.zeros((20, 30, 40), np.uint8)
    save_preview(tmp_path / "a.png", scan_of(mask), mask, SPACING_MM, window=WINDOW)
    axes = figures[0].axes
    assert [ax.get_title() for ax in axes] == [
        "axial, slice 11 of 20",
        "coronal, slice 16 of 30",
        "sagittal, slice 21 of 40",
    ]
    assert [outlines(ax) for ax in axes] == [[], [], []]


def test_a_single_slice_has_no_other_planes(tmp_path: Path, figures: list[Figure]) -> None:
    mask = np.zeros((1, 30, 40), np.uint8)
    save_preview(tmp_path / "a.png", scan_of(mask), mask, SPACING_MM, window=WINDOW)
    assert [ax.get_title() for ax in figures[0].axes] == ["axial, slice 1 of 1"]


def test_classes_have_colours_of_their_own(tmp_path: Path, figures: list[Figure], mask: np.ndarray) -> None:
    mask[5, 5:10, 5:10] = 2
    save_preview(tmp_path / "a.png", scan_of(mask), mask, SPACING_MM, window=WINDOW)
    assert [outline.colour for outline in outlines(figures[0].axes[0])] == [RED, BLUE]


def test_voxels_have_their_proportions_and_grey_values_the_window(
    tmp_path: Path, figures: list[Figure], mask: np.ndarray
) -> None:
    save_preview(tmp_path / "a.png", scan_of(mask), mask, (2.5, 0.8, 0.5), window=WINDOW)
    axial, coronal, sagittal, _ = figures[0].axes
    assert [ax.get_aspect() for ax in (axial, coronal, sagittal)] == pytest.approx([1.6, 5.0, 3.125])
    assert {ax.images[0].get_clim() for ax in figures[0].axes} == {WINDOW}


def test_shapes_that_do_not_agree_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"image \(2, 8, 8\) and mask \(2, 8, 9\)"):
        save_preview(tmp_path / "a.png", np.zeros((2, 8, 8)), np.zeros((2, 8, 9)), SPACING_MM, window=WINDOW)


def test_planes_go_through_the_largest_lesion_not_through_several_small_ones(
    tmp_path: Path, figures: list[Figure], mask: np.ndarray
) -> None:
    mask[15, 5:80:2, 5:95:2] = 1  # more voxels in one slice than the lesion has, none of them connected
    save_preview(tmp_path / "a.png", scan_of(mask), mask, SPACING_MM, window=WINDOW)
    assert [ax.get_title() for ax in figures[0].axes[:3]] == [
        "axial, slice 6 of 20",
        "coronal, slice 31 of 90",
        "sagittal, slice 61 of 100",
    ]


def test_sides_of_the_patient_and_what_was_found_are_written(
    tmp_path: Path, figures: list[Figure], mask: np.ndarray
) -> None:
    legend = {1: "tumour: 2.30 ml, longest diameter 14.2 mm"}
    save_preview(tmp_path / "a.png", scan_of(mask), mask, SPACING_MM, window=WINDOW, legend=legend)
    letters = [[text.get_text() for text in ax.texts if len(text.get_text()) == 1] for ax in figures[0].axes]
    assert letters == [["R", "L"], ["R", "L"], ["A", "P"], ["R", "L"]]
    (shown,) = figures[0].legends
    assert [text.get_text() for text in shown.get_texts()] == list(legend.values())
    assert [line.get_color() for line in shown.get_lines()] == [RED]
