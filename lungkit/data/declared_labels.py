"""Labels as a ``dataset.json`` declares them: classes that exclude each other, or regions inside each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lungkit._text import is_printable
from lungkit.data.dataset import IGNORE_INDEX, MAX_LABEL_VALUE
from lungkit.errors import DataError

Regions = dict[str, tuple[int, ...]]
"""Region -> the mask values that belong to it, see :attr:`lungkit.data.Dataset.regions`."""


def parse_labels(content: dict[str, Any], path: Path) -> tuple[dict[str, int], int | None, Regions]:
    """Labels by name, the value to ignore if there is one, and regions if there are any, that ``content`` declares.

    Args:
        content: of a ``dataset.json``.
        path: of it, for messages.

    Raises:
        DataError: no usable labels.

    Example:
        >>> labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
        >>> parse_labels({"labels": labels, "regions_class_order": [1, 2]}, Path("dataset.json"))
        ({'background': 0, 'whole': 1, 'core': 2}, 3, {'whole': (1, 2), 'core': (2,)})
    """
    declared = content.get("labels")
    if not isinstance(declared, dict) or not declared:
        raise DataError(f'{path}: \'labels\' must map names to values, e.g. {{"background": 0, "tumour": 1}}')
    regions: Regions = {}
    if "regions_class_order" in content or any(isinstance(value, list) for value in declared.values()):
        regions, declared = _parse_regions(declared, content.get("regions_class_order"), path)
    labels: dict[str, int] = {}
    for key, value in declared.items():
        # nnU-Net 2 writes name: value, Decathlon and nnU-Net 1 write "value": name.
        name, number = (key, value) if as_int(value) is not None and not key.isdigit() else (value, key)
        parsed = as_int(number)
        if parsed is None or parsed < 0 or not isinstance(name, str):
            raise DataError(f"{path}: label {key!r}: {value!r} is not a name with a whole number >= 0")
        if not is_printable(name):
            raise DataError(f"{path}: label {name!r} holds what is no letter; give the class another name")
        if parsed > MAX_LABEL_VALUE:
            raise DataError(
                f"{path}: label {name!r} has the value {parsed}; masks hold values up to {MAX_LABEL_VALUE} (uint16): "
                "give the classes smaller values"
            )
        if name in labels or parsed in labels.values():
            raise DataError(f"{path}: label {name!r} or its value {parsed} is declared twice")
        labels[name] = parsed
    ignore_label = labels.pop("ignore", None)
    if 0 not in labels.values():
        raise DataError(f'{path}: no label has the value 0; declare "background": 0')
    if not 2 <= len(labels) <= IGNORE_INDEX:
        raise DataError(
            f"{path}: {len(labels)} labels declared; expected the background and 1 to 254 classes"
        )
    return labels, ignore_label, regions


def _parse_regions(declared: dict[str, Any], order: object, path: Path) -> tuple[Regions, dict[str, Any]]:
    """Regions as nnU-Net declares them, in the order of writing, and the value that each is written as, as labels."""
    regions: Regions = {}
    labels: dict[str, Any] = {}
    for name, value in declared.items():
        if name == "ignore" or value == 0:
            labels[name] = value
            continue
        values = [as_int(entry) for entry in (value if isinstance(value, list) else [value])]
        if not values or any(entry is None or entry < 1 for entry in values):
            raise DataError(f"{path}: region {name!r}: {value!r} must list mask values of at least 1")
        regions[name] = tuple(entry for entry in values if entry is not None)
    written = [as_int(entry) for entry in order] if isinstance(order, list) else []
    if len(written) != len(regions) or len(set(written)) < len(written):
        raise DataError(
            f"{path}: 'regions_class_order' must give each of the {len(regions)} regions ({', '.join(regions)}) a mask "
            f"value of its own, in the order in which they are written, found {order!r:.80}"
        )
    values_of_all = {value for values in regions.values() for value in values}
    if set(written) != values_of_all:
        raise DataError(
            f"{path}: regions are made of the values {sorted(values_of_all)}, 'regions_class_order' is {written}; each "
            "value must be the one that a region is written as"
        )
    for name, value in zip(regions, written, strict=True):
        if value not in regions[name]:
            raise DataError(
                f"{path}: region {name!r} of values {list(regions[name])} would be written as {value}, which is none "
                "of them; put 'regions_class_order' in the order of the labels"
            )
        labels[name] = value
    return regions, labels


def as_int(value: object) -> int | None:
    """The whole number that an entry of a ``dataset.json`` stands for; None where it stands for none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value) else None
