"""Labels of a ``dataset.json``: classes, and nnU-Net's regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lungkit.data.dataset import Dataset
from lungkit.data.declared_labels import parse_labels
from lungkit.errors import DataError

KITS = {
    "labels": {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2},
    "regions_class_order": [1, 3, 2],
}


def parse(content: dict[str, Any]) -> Any:
    return parse_labels(content, Path("dataset.json"))


def test_regions_are_written_as_the_values_of_their_order():
    labels, ignore, regions = parse(KITS)
    assert labels == {"background": 0, "kidney": 1, "masses": 3, "tumour": 2}
    assert ignore is None
    assert list(regions.items()) == [("kidney", (1, 2, 3)), ("masses", (2, 3)), ("tumour", (2,))]


def test_classes_have_no_regions():
    assert parse({"labels": {"background": 0, "tumour": 1, "ignore": 2}}) == (
        {"background": 0, "tumour": 1},
        2,
        {},
    )


def test_channels_are_those_of_the_classes_in_the_order_of_their_values():
    labels, _, regions = parse(KITS)
    dataset = Dataset(Path(), "kits", (), labels, ("CT",), None, "nnunet", regions=regions)
    assert dataset.outputs == 3 and dataset.class_names == ("background", "kidney", "tumour", "masses")
    np.testing.assert_array_equal(dataset.region_vectors, [[0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1]])
    assert dataset.region_classes == {"kidney": (1, 2, 3), "masses": (2, 3), "tumour": (2,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions_class_order": None}, "must give each of the 3 regions"),
        ({"regions_class_order": [1, 3]}, "must give each of the 3 regions"),
        ({"regions_class_order": [1, 3, 3]}, "a mask value of its own"),
        ({"regions_class_order": [1, 3, 4]}, r"made of the values \[1, 2, 3\]"),
        ({"regions_class_order": [2, 1, 3]}, "would be written as 1, which is none of them"),
        ({"labels": {"background": 0, "kidney": []}}, "must list mask values of at least 1"),
        ({"labels": {"background": 0, "kidney": ["a"]}}, "must list mask values of at least 1"),
    ],
)
def test_regions_that_make_no_sense_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        parse(KITS | change)
