"""Points in text and tables, and the measures at them."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from lungkit.data import Volume
from lungkit.errors import DataError, UsageError
from lungkit.inference import Box, PointedNodule, PointedPrediction
from lungkit.pipeline.pointed import measure_points, parse_box, parse_point, read_points, write_points


def test_points_and_boxes_in_both_systems():
    assert parse_point("1,2,3", "ras") == (1, 2, 3)
    assert parse_point(" 1, -2 ,3e1", "lps") == (-1, 2, 30)
    assert parse_box("1,2,3,4,5,6", "lps") == Box((-1, -2, 3), (-4, -5, 6))


@pytest.mark.parametrize("text", ["1,2", "1,2,3,4", "1,2,x", "1;2;3", "nan,0,0", ""])
def test_what_is_no_point_is_named(text):
    with pytest.raises(UsageError, match=r"--at .*expected X,Y,Z, 3 numbers in mm"):
        parse_point(text, "lps")


def test_a_table_of_points_may_have_other_columns(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("\ufeffid,X,y,z\nfirst,1,2,3\nsecond, 4, 5, 6\n", encoding="utf-8")
    assert read_points(path, "lps") == [(-1, -2, 3), (-4, -5, 6)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "columns x, y and z.*found a, b"),
        ("", "found nothing"),
        ("x,y,z\n", "no point"),
        ("x,y,z\n1,2,3\n1,2\n", "line 3"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_points(path, "lps")


def test_measures_of_each_nodule_and_the_reason_where_there_is_none(tmp_path):
    array = np.full((20, 20, 6), -800, np.int16)
    mask = np.zeros(array.shape, np.uint8)
    mask[2:6, 3:6, 2] = 1
    array[2:6, 3:6, 2] = 30
    array[2, 3:6, 2] = -400
    nodules = (
        PointedNodule(1, (4.0, 4.0, 4.0), True, "", 12, 0.5),
        PointedNodule(2, (15.0, 15.0, 4.0), False, "no nodule"),
    )
    prediction = PointedPrediction(
        mask,
        np.diag([1.0, 1.0, 2.0, 1.0]),
        {"background": 0, "nodule 1": 1},
        0.0,
        "cpu",
        "fp32",
        nodules=nodules,
    )
    found, missing = measure_points(prediction, Volume(array, prediction.affine))
    assert found["volume_ml"] == 0.024 and found["mean_intensity"] == (9 * 30 - 3 * 400) / 12
    assert found["solid_share"] == 0.75 and found["stability"] == 0.5
    assert (found["x_lps_mm"], found["y_lps_mm"], found["z_lps_mm"]) == (-4, -4, 4)
    assert not missing["found"] and missing["reason"] == "no nodule" and "volume_ml" not in missing
    write_points(tmp_path / "n.csv", [missing, found])
    rows = list(csv.DictReader((tmp_path / "n.csv").open()))
    assert rows[1]["volume_ml"] == "0.024" and rows[0]["volume_ml"] == ""
