"""The page of a scan says what it holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lungkit.data import Volume
from lungkit.data.geometry import plan_geometry
from lungkit.errors import UsageError
from lungkit.report.html import Case, MapLayer, MaskLayer, write_case_page

SHAPE = (4, 16, 20)
GEOMETRY = plan_geometry(Volume(np.zeros(SHAPE[::-1]), np.diag([-0.8, -0.8, 2.5, 1.0])))


def lesion(at: int) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:3, 4:8, at : at + 4] = 1
    return mask


def scan_of(path: Path) -> dict[str, Any]:
    block = re.search(r'<script type="application/json" id="scan">(.*?)</script>', path.read_text())
    assert block is not None
    content: dict[str, Any] = json.loads(block[1])
    return content


def test_predictions_truth_and_maps_are_layers(tmp_path: Path) -> None:
    layers = [
        MaskLayer("A", lesion(3), {"tumour": 1}),
        MaskLayer("B", lesion(9), {"tumour": 1}),
        MaskLayer("truth", lesion(4), {"tumour": 1}, "truth"),
    ]
    maps = [MapLayer("attention", np.zeros(SHAPE, np.float32))]
    image = np.full(SHAPE, -700, np.int16)
    write_case_page(tmp_path / "a.html", Case("a", GEOMETRY, image, layers, maps))
    scan = scan_of(tmp_path / "a.html")
    assert [(one["name"], one["model"], one["dashed"]) for one in scan["masks"]] == [
        ("A", True, False),
        ("B", True, False),
        ("truth", False, True),
    ]
    assert len({one["classes"][0]["colour"] for one in scan["masks"]}) == 3
    assert scan["unit"] == "HU"
    assert "Side by side" in (tmp_path / "a.html").read_text()


def test_the_crosshair_begins_in_the_largest_lesion(tmp_path: Path) -> None:
    write_case_page(
        tmp_path / "a.html", Case("a", GEOMETRY, masks=[MaskLayer("prediction", lesion(3), {"tumour": 1})])
    )
    x, y, z = scan_of(tmp_path / "a.html")["start"]
    assert lesion(3)[z, y, x] == 1


def test_a_scan_at_a_part_of_its_resolution_says_so(tmp_path: Path) -> None:
    case = Case("a", GEOMETRY, np.zeros(SHAPE, np.int16))
    write_case_page(tmp_path / "whole.html", case)
    write_case_page(tmp_path / "half.html", case, max_voxels=400)
    assert "of its resolution" not in (tmp_path / "whole.html").read_text()
    assert "1 / (2 × 2 × 1) of its resolution" in (tmp_path / "half.html").read_text()


def test_classes_have_colours_of_their_own_in_every_mask(tmp_path: Path) -> None:
    labels = {"background": 0, "tumour": 1, "node": 2}
    both = lesion(3) + 2 * lesion(12)
    layers = [MaskLayer("prediction", both, labels), MaskLayer("truth", both, labels, "truth")]
    write_case_page(tmp_path / "a.html", Case("a", GEOMETRY, masks=layers))
    first, second = (one["classes"] for one in scan_of(tmp_path / "a.html")["masks"])
    assert first == second
    assert first[0]["colour"] != first[1]["colour"]


def test_a_mask_of_another_grid_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a: mask 'B' has shape \(1, 2, 3\), the scan \(4, 16, 20\)"):
        write_case_page(
            tmp_path / "a.html",
            Case("a", GEOMETRY, masks=[MaskLayer("B", np.zeros((1, 2, 3)), {"tumour": 1})]),
        )
