"""Figures: which slice and which part of it is shown, what is drawn, and bad arguments."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lungkit.errors import UsageError
from lungkit.metrics import CaseTable
from lungkit.report import choose_slice, save_curves, save_distributions, save_overlays
from lungkit.report._drawing import crop_box

EPOCHS = [{"epoch": i, "train_loss": 1 / (i + 1), "val_dice": i / 4, "lr": 0.01} for i in range(4)]


def mask_of(shape: tuple[int, ...], *boxes: tuple[slice, ...]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for box in boxes:
        mask[box] = 1
    return mask


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def has_colour(path: Path, red: int, green: int, blue: int) -> bool:
    return bool((np.abs(pixels(path) - (red, green, blue)).max(-1) < 12).any())


TRUTH_GREEN, PREDICTION_RED = (0x3D, 0xDC, 0x84), (0xFF, 0x6B, 0x4A)


def test_slice_is_the_one_with_most_truth() -> None:
    truth = mask_of((4, 8, 8), np.s_[1, :2, :2], np.s_[3, :4, :4])
    assert choose_slice(truth, mask_of((4, 8, 8), np.s_[0])) == 3


def test_slice_of_an_empty_truth_is_the_one_with_most_prediction() -> None:
    assert choose_slice(mask_of((4, 8, 8)), mask_of((4, 8, 8), np.s_[2, 0, 0])) == 2


def test_ignored_voxels_do_not_choose_the_slice() -> None:
    truth = mask_of((4, 8, 8), np.s_[1, :2, :2]) + mask_of((4, 8, 8), np.s_[3]) * 255
    assert choose_slice(truth, ignore_index=255) == 1


def test_crop_holds_the_foreground_and_is_square() -> None:
    rows, columns = crop_box(mask_of((200, 300), np.s_[190:200, 20:45]) != 0)
    assert rows.start <= 190 and rows.stop == 200
    assert columns.start <= 20 and columns.stop >= 45
    assert rows.stop - rows.start == columns.stop - columns.start


@pytest.mark.parametrize("mask", [mask_of((64, 64)), mask_of((64, 64), np.s_[4:60, 4:60])])
def test_nothing_is_cropped_without_foreground_or_with_much_of_it(mask: np.ndarray) -> None:
    assert crop_box(mask != 0) == (slice(0, 64), slice(0, 64))


@pytest.mark.parametrize("spacing_mm", [None, (5.0, 0.7, 0.7), (1.0, 2.0, 1.0)])
def test_overlay_shows_both_contours(tmp_path: Path, spacing_mm: tuple[float, ...] | None) -> None:
    truth = mask_of((3, 96, 96), np.s_[1, 10:30, 10:30])
    save_overlays(
        tmp_path / "a.png",
        np.zeros((1, 3, 96, 96), np.float32),
        truth,
        np.roll(truth, 5, 2),
        np.zeros((96, 96)),
        spacing_mm=spacing_mm,
    )
    assert has_colour(tmp_path / "a.png", *TRUTH_GREEN)
    assert has_colour(tmp_path / "a.png", *PREDICTION_RED)


def test_empty_masks_draw_no_contour(tmp_path: Path) -> None:
    empty = mask_of((3, 96, 96))
    save_overlays(tmp_path / "a.png", np.zeros((3, 96, 96)), empty, empty)
    assert not has_colour(tmp_path / "a.png", *TRUTH_GREEN)


def test_ignored_voxels_are_no_foreground(tmp_path: Path) -> None:
    truth = mask_of((1, 96, 96), np.s_[:, 10:30, 10:30]) * 255
    save_overlays(tmp_path / "a.png", np.zeros((1, 96, 96)), truth, truth * 0, ignore_index=255)
    assert not has_colour(tmp_path / "a.png", *TRUTH_GREEN)


def test_every_model_gets_its_panel(tmp_path: Path) -> None:
    truth = mask_of((1, 64, 64), np.s_[:, 10:30, 10:30])
    save_overlays(tmp_path / "one.png", np.zeros((1, 64, 64)), truth, truth)
    save_overlays(tmp_path / "two.png", np.zeros((1, 64, 64)), truth, {"a": truth, "b": truth})
    assert pixels(tmp_path / "two.png").shape[1] == pytest.approx(
        pixels(tmp_path / "one.png").shape[1] * 4 / 3, abs=2
    )


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


def test_curves_have_a_panel_for_each_kind_of_column(tmp_path: Path) -> None:
    save_curves(tmp_path / "three.png", EPOCHS)
    save_curves(tmp_path / "one.png", [{"epoch": 0, "train_loss": 1.0}])
    assert pixels(tmp_path / "three.png").shape[1] == 3 * pixels(tmp_path / "one.png").shape[1]


def test_missing_values_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"epoch": 0, "val_dice": None},
        {"epoch": 1, "val_dice": math.nan},
        {"epoch": 2, "val_dice": "0.5"},
    ]
    save_curves(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").exists()


def test_curves_of_several_runs(tmp_path: Path) -> None:
    save_curves(tmp_path / "a.png", {"unet": EPOCHS, "attention-unet": EPOCHS[:2]})
    assert (tmp_path / "a.png").exists()


def test_nothing_to_draw_names_the_columns(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seconds"):
        save_curves(tmp_path / "a.png", [{"epoch": 0, "seconds": 3.0}])


def test_row_without_epoch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="row 1"):
        save_curves(tmp_path / "a.png", [*EPOCHS[:1], {"train_loss": 1.0}])


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, lungkit.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def dice_table(*values: float) -> CaseTable:
    table = CaseTable()
    for case, value in enumerate(values):
        table.add_row(str(case), "tumour", {"dice": value, "iou": value / 2})
    return table


def test_distribution_has_a_panel_for_each_metric(tmp_path: Path) -> None:
    table = dice_table(0.2, 0.5, 0.9)
    save_distributions(tmp_path / "one.png", table, ["dice"])
    save_distributions(tmp_path / "two.png", table, ["dice", "iou"])
    assert pixels(tmp_path / "two.png").shape[1] == 2 * pixels(tmp_path / "one.png").shape[1]


def test_distribution_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    save_distributions(
        tmp_path / "a.png", {"unet": dice_table(math.nan, math.inf), "other": dice_table(0.5)}, ["dice"]
    )
    assert (tmp_path / "a.png").exists()


def test_same_numbers_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_distributions(tmp_path / name, dice_table(0.2, 0.5, 0.9), ["dice"])
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_metric_that_is_not_in_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'hd'"):
        save_distributions(tmp_path / "a.png", dice_table(0.5), ["hd"])


def test_a_slice_is_shown_front_up_and_patients_right_on_the_left(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.imshow", lambda self, image, **_: shown.append(np.asarray(image))
    )
    image = np.zeros((1, 4, 6), np.float32)
    image[0, 3, 5] = 1.0  # front, right
    empty = np.zeros((1, 4, 6), np.uint8)
    save_overlays(tmp_path / "case.png", image, empty, empty)
    assert shown[0][0, 0] == 1.0
