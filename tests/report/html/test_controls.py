"""The tables and buttons round the viewer."""

from __future__ import annotations

from dataclasses import replace

from lungkit.report.html.controls import findings_panel, toolbar
from lungkit.report.html.lesions import Lesion

LESION = Lesion("tumour", 1.234, 20.04, 10.0, (1.0, -2.0, 3.0), (4, 5, 6), 100, mean_value=12.6)


def test_a_lesion_is_a_row_whose_button_knows_its_voxel() -> None:
    written = findings_panel({"prediction": ([LESION], 1)}, unit="HU")
    assert 'data-voxel="4,5,6"' in written
    for cell in ("1.23", "20.0", "10.0", "1.0, -2.0, 3.0", "13"):
        assert f">{cell}</td>" in written
    assert "Confidence" not in written


def test_masks_and_classes_are_named_where_there_are_several() -> None:
    other = replace(LESION, label="node", confidence=0.5)
    written = findings_panel({"A": ([LESION], 1), "<B>": ([other], 1)}, unit=None)
    assert "&lt;B&gt;</td>" in written
    assert ">node</td>" in written
    assert ">0.50</td>" in written


def test_a_long_list_is_cut_and_says_so() -> None:
    written = findings_panel({"prediction": ([LESION] * 2, 5)}, unit="HU")
    assert written.count("data-voxel") == 2
    assert "3 smaller ones are not listed" in written


def test_masks_without_lesions_are_said_to_have_none() -> None:
    assert "None." in findings_panel({"prediction": ([], 0)}, unit="HU")
    assert findings_panel({}, unit="HU") == ""


def test_models_are_compared_where_there_are_two() -> None:
    windows = [("Lung", (-1350.0, 150.0))]
    assert "Side by side" in toolbar(windows, models=2)
    assert "Side by side" not in toolbar(windows, models=1)
