"""Overlays: which slice and which part of it is shown, which outlines are drawn where, and bad arguments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pictures import Outline, edge_of, image_of, outlines, pixels, shows

from lungkit.errors import UsageError
from lungkit.report import choose_slice, save_overlays

GREEN, RED, BLUE, WHITE = "#3ddc84", "#ff6b4a", "#4aa8ff", "#ffffff"


def mask_of(shape: tuple[int, ...], *boxes: tuple[slice, ...]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for box in boxes:
        mask[box] = 1
    return mask


TRUTH = mask_of((3, 96, 96), np.s_[1, 10:30, 10:30])
# Array rows 10 to 29 of 96 are seen as rows 66 to 85: front up, the patient's right on the left.
TRUE_SPAN = (65.5, 85.5)


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes if ax.get_label() != "<colorbar>"]


# ---- which slice ------------------------------------------------------------------------------------------------


def test_slice_is_the_one_with_most_truth() -> None:
    truth = mask_of((4, 8, 8), np.s_[1, :2, :2], np.s_[3, :4, :4])
    assert choose_slice(truth, mask_of((4, 8, 8), np.s_[0])) == 3


def test_slice_of_an_empty_truth_is_the_one_with_most_prediction() -> None:
    assert choose_slice(mask_of((4, 8, 8)), mask_of((4, 8, 8), np.s_[2, 0, 0])) == 2


def test_ignored_voxels_do_not_choose_the_slice() -> None:
    truth = mask_of((4, 8, 8), np.s_[1, :2, :2]) + mask_of((4, 8, 8), np.s_[3]) * 255
    assert choose_slice(truth, ignore_index=255) == 1


def test_the_slice_is_named_after_the_title(tmp_path: Path, figures: list[Figure]) -> None:
    save_overlays(tmp_path / "a.png", np.zeros((3, 96, 96)), TRUTH, TRUTH, title="case 7")
    assert figures[0].get_suptitle() == "case 7 · slice 2 of 3"


# ---- what is drawn where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing_mm", [None, (5.0, 0.7, 0.7), (1.0, 2.0, 1.0)])
def test_outlines_lie_where_the_masks_do(
    tmp_path: Path, figures: list[Figure], spacing_mm: tuple[float, ...] | None
) -> None:
    predicted = np.roll(TRUTH, 5, 2)
    image = np.zeros((1, 3, 96, 96), np.float32)
    save_overlays(tmp_path / "a.png", image, TRUTH, predicted, spacing_mm=spacing_mm)
    ct, truth, prediction = figures[0].axes
    assert outlines(ct) == []
    assert outlines(truth) == [Outline(GREEN, False, TRUE_SPAN, TRUE_SPAN)]
    assert outlines(prediction) == [
        Outline(GREEN, True, TRUE_SPAN, TRUE_SPAN),
        Outline(RED, False, TRUE_SPAN, (60.5, 80.5)),
    ]


def test_the_file_shows_the_outlines_in_their_colours(tmp_path: Path, figures: list[Figure]) -> None:
    path = tmp_path / "a.png"
    save_overlays(path, np.zeros((3, 96, 96), np.float32), TRUTH, np.roll(TRUTH, 30, 2))
    _, truth, prediction = figures[0].axes
    assert shows(path, truth, 75.0, TRUE_SPAN[0], GREEN)
    assert shows(path, prediction, 75.0, TRUE_SPAN[0] - 30, RED)
    assert shows(path, truth, 75.0, TRUE_SPAN[0] - 30, "#000000")


def test_a_small_mask_is_shown_enlarged_and_framed_in_the_ct(tmp_path: Path, figures: list[Figure]) -> None:
    truth = mask_of((1, 128, 160), np.s_[0, 20:26, 120:130])
    save_overlays(tmp_path / "a.png", truth.astype(np.float32), truth, truth)
    ct, enlarged, _ = figures[0].axes
    assert image_of(ct).shape == (128, 160)
    assert image_of(enlarged).shape == (48, 48)
    (outline,) = outlines(enlarged)
    assert (outline.rows, outline.columns) == edge_of(image_of(enlarged) == 1)
    (frame,) = (patch for patch in ct.patches if isinstance(patch, Rectangle))
    assert (frame.get_height(), frame.get_width()) == (48, 48)
    left, top = int(frame.get_x() + 0.5), int(frame.get_y() + 0.5)
    assert np.array_equal(image_of(ct)[top : top + 48, left : left + 48], image_of(enlarged))


def test_classes_have_colours_of_their_own(tmp_path: Path, figures: list[Figure]) -> None:
    labels = TRUTH + mask_of((3, 96, 96), np.s_[1, 60:70, 60:90]) * 2
    save_overlays(tmp_path / "a.png", np.zeros((3, 96, 96)), labels * 0, labels, slice_index=1)
    assert outlines(figures[0].axes[2]) == [
        Outline(RED, False, TRUE_SPAN, TRUE_SPAN),
        Outline(BLUE, False, (25.5, 35.5), (5.5, 35.5)),
    ]


def test_empty_masks_draw_no_outline(tmp_path: Path, figures: list[Figure]) -> None:
    empty = mask_of((3, 96, 96))
    save_overlays(tmp_path / "a.png", np.zeros((3, 96, 96)), empty, empty)
    assert [outlines(ax) for ax in figures[0].axes] == [[], [], []]


def test_ignored_voxels_are_no_foreground(tmp_path: Path, figures: list[Figure]) -> None:
    truth = mask_of((1, 96, 96), np.s_[:, 10:30, 10:30]) * 255
    save_overlays(tmp_path / "a.png", np.zeros((1, 96, 96)), truth, truth * 0, ignore_index=255)
    assert [outlines(ax) for ax in figures[0].axes] == [[], [], []]


def test_every_model_gets_its_panel(tmp_path: Path, figures: list[Figure]) -> None:
    blank = np.zeros((3, 96, 96))
    save_overlays(tmp_path / "one.png", blank, TRUTH, TRUTH)
    save_overlays(tmp_path / "two.png", blank, TRUTH, {"a": TRUTH, "b": np.roll(TRUTH, 5, 1)})
    assert [titles(figure) for figure in figures] == [
        ["CT", "Truth", "Prediction"],
        ["CT", "Truth", "a", "b"],
    ]
    assert [outlines(ax)[-1].rows for ax in figures[1].axes[2:]] == [TRUE_SPAN, (60.5, 80.5)]
    one, two = (pixels(tmp_path / name).shape[1] for name in ("one.png", "two.png"))
    assert two == pytest.approx(one * 4 / 3, abs=2)


def test_attention_is_shown_beside_its_model(tmp_path: Path, figures: list[Figure]) -> None:
    alpha = np.linspace(0, 1, 96 * 96, dtype=np.float32).reshape(96, 96)
    save_overlays(tmp_path / "a.png", np.zeros((3, 96, 96)), TRUTH, {"a": TRUTH, "b": TRUTH}, {"b": alpha})
    assert titles(figures[0]) == ["CT", "Truth", "a", "b", "b: attention\n(finest level)"]
    panel = figures[0].axes[4]
    assert np.array_equal(panel.images[1].get_array(), alpha[::-1, ::-1][48:, 48:])  # the part round the mask
    assert panel.images[1].get_clim() == (0, 1)
    assert outlines(panel) == [Outline(WHITE, True, (17.5, 37.5), (17.5, 37.5))]


def test_a_slice_is_shown_front_up_and_patients_right_on_the_left(
    tmp_path: Path, figures: list[Figure]
) -> None:
    image = np.zeros((1, 4, 6), np.float32)
    image[0, 3, 5] = 1.0  # front, right
    empty = np.zeros((1, 4, 6), np.uint8)
    save_overlays(tmp_path / "case.png", image, empty, empty)
    assert image_of(figures[0].axes[0])[0, 0] == 1.0


@pytest.mark.parametrize(("window", "limits"), [((-150.0, 250.0), (-150, 250)), (None, (0, 800))])
def test_grey_values_are_those_of_the_window(
    tmp_path: Path, figures: list[Figure], window: tuple[float, float] | None, limits: tuple[float, float]
) -> None:
    save_overlays(tmp_path / "a.png", TRUTH * 800.0, TRUTH, TRUTH, window=window)
    assert {ax.images[0].get_clim() for ax in figures[0].axes} == {limits}


def test_spacing_sets_the_aspect_and_a_scale_bar(tmp_path: Path, figures: list[Figure]) -> None:
    save_overlays(tmp_path / "a.png", np.zeros((3, 96, 96)), TRUTH, TRUTH, spacing_mm=(5.0, 1.4, 0.7))
    ct = figures[0].axes[0]
    assert ct.get_aspect() == pytest.approx(2.0)
    assert [text.get_text() for text in ct.texts] == ["20 mm"]
    assert np.ptp(ct.lines[0].get_xdata()) == pytest.approx(20 / 0.7)


# ---- bad arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": np.zeros((2, 8, 8))}, r"truth \(2, 8, 8\)"),
        ({"prediction": {"unet": np.zeros((1, 8, 9))}}, "prediction unet"),
        ({"attention": np.zeros((4, 4))}, r"attention \(4, 4\)"),
        ({"attention": {"unet": np.zeros((8, 8))}}, "'unet'"),
        ({"slice_index": 1}, "slice_index"),
        ({"image": np.zeros((8, 8))}, "image"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    blank = np.zeros((1, 8, 8))
    arguments = {"image": blank, "truth": blank, "prediction": blank, **change}
    with pytest.raises(UsageError, match=message):
        save_overlays(tmp_path / "a.png", **arguments)
    assert not list(tmp_path.iterdir())
