"""Splits into training and validation cases: read from the dataset, or made, never dividing a patient."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungkit._atomic import write_json_atomic
from lungkit._reading import read_json
from lungkit.data.dataset import Dataset
from lungkit.errors import DataError, UsageError, shorten

_LOG = logging.getLogger("lungkit")

SPLITS_FILE = "splits_final.json"
"""Name under which nnU-Net looks for splits, and so do we."""


@dataclass(frozen=True)
class Split:
    """One fold: the ids of its training and of its validation cases, both sorted."""

    train: tuple[str, ...]
    val: tuple[str, ...]


def make_or_load_splits(
    dataset: Dataset, *, folds: int = 5, seed: int = 0, patient_pattern: str | None = None
) -> list[Split]:
    """The folds of ``dataset``: those of its ``splits_final.json`` where it has one, else new ones.

    New folds are a function of the case ids, ``folds``, ``seed`` and the pattern alone. Groups are shuffled,
    then the largest goes first, each to the fold with the fewest cases so far, so that fold sizes differ by
    no more than the largest group.

    Args:
        dataset: the dataset.
        folds: how many folds to make, at most one a group; a ``splits_final.json`` decides for itself.
        seed: for the shuffle.
        patient_pattern: regular expression with one group, searched in each case id; cases with the same
            match stay together. Without it :attr:`Case.group` decides.

    Raises:
        UsageError: fewer than two folds or groups, or a pattern that is invalid, has not
            exactly one group, or does not match a case id.
        DataError: ``splits_final.json`` is malformed, names unknown cases, or has a fold that is empty or
            whose training and validation overlap.

    Example:
        >>> from lungkit.data import Case
        >>> ids = ["p1_a", "p1_b", "p2_a", "p3_a"]
        >>> cases = tuple(Case(name, (), None, name) for name in ids)
        >>> dataset = Dataset(Path("absent"), "demo", cases, {"background": 0}, ("CT",), None, "folders")
        >>> [split.val for split in make_or_load_splits(dataset, folds=2, patient_pattern=r"(p\\d+)_")]
        [('p1_a', 'p1_b'), ('p2_a', 'p3_a')]
    """
    groups = patients(dataset, patient_pattern)
    path = dataset.root / SPLITS_FILE
    if path.is_file():
        splits = _load(path, dataset)
        for index, split in enumerate(splits):
            shared = {groups[name] for name in split.train} & {groups[name] for name in split.val}
            if shared:
                _LOG.warning(
                    "%s: fold %d has cases of %s in training and in validation, which flatters the result",
                    path,
                    index,
                    shorten(sorted(shared)),
                )
        return splits
    return _make(groups, folds, seed)


def write_splits(directory: str | os.PathLike[str], splits: Sequence[Split]) -> Path:
    """Write ``splits`` to ``splits_final.json`` in ``directory``, whole or not at all, and return its path.

    The directory need not be the dataset's, which may be read-only.

    Example:
        >>> import tempfile
        >>> write_splits(tempfile.mkdtemp(), [Split(train=("a", "b"), val=("c",))]).name
        'splits_final.json'
    """
    path = Path(directory) / SPLITS_FILE
    write_json_atomic(path, [{"train": list(split.train), "val": list(split.val)} for split in splits])
    return path


def patients(dataset: Dataset, patient_pattern: str | None = None) -> dict[str, str]:
    """Whose each case is: case id -> patient, as for :func:`make_or_load_splits`.

    Raises:
        UsageError: the pattern is invalid, has not exactly one group, or does not match a case id.
    """
    if patient_pattern is None:
        return {case.case_id: case.group for case in dataset.cases}
    try:
        pattern = re.compile(patient_pattern)
    except re.error as error:
        raise UsageError(
            f"patient_pattern: {patient_pattern!r} is not a regular expression ({error})"
        ) from error
    if pattern.groups != 1:
        raise UsageError(
            f"patient_pattern: {patient_pattern!r} has {pattern.groups} groups, expected one, "
            "as in '(.+)_scan'"
        )
    matches = {case.case_id: pattern.search(case.case_id) for case in dataset.cases}
    unmatched = [name for name, match in matches.items() if match is None or match[1] is None]
    if unmatched:
        raise UsageError(f"patient_pattern: {patient_pattern!r} does not match {shorten(unmatched)}")
    return {name: match[1] for name, match in matches.items() if match is not None}


def _make(groups: dict[str, str], folds: int, seed: int) -> list[Split]:
    members: dict[str, list[str]] = {}
    for name in sorted(groups):
        members.setdefault(groups[name], []).append(name)
    if folds < 2:
        raise UsageError(f"folds: {folds} leaves nothing to validate on; use 2 or more")
    if len(members) < 2:
        raise UsageError(
            f"data.folds: all cases are of one patient ({shorten(sorted(members))}), which leaves nothing to validate "
            "on; training needs labelled cases of two (data.patient_pattern says which cases are whose)"
        )
    if folds > len(members):
        _LOG.warning(
            "data.folds: %d folds cannot be made of %d patients or cases; %d are made",
            folds,
            len(members),
            len(members),
        )
        folds = len(members)
    names = sorted(members)
    shuffled = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    shuffled.sort(key=lambda name: -len(members[name]))  # stable: equal sizes stay shuffled
    validation: list[list[str]] = [[] for _ in range(folds)]
    for name in shuffled:
        min(validation, key=len).extend(members[name])
    return [
        Split(train=tuple(sorted(set(groups) - set(fold))), val=tuple(sorted(fold))) for fold in validation
    ]


def _load(path: Path, dataset: Dataset) -> list[Split]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: expected a list of folds, each {{train, val}}")
    known = {case.case_id for case in dataset.cases}
    splits = [_parse_fold(path, index, fold, known) for index, fold in enumerate(content)]
    unused = known - {name for split in splits for name in (*split.train, *split.val)}
    if unused:
        _LOG.warning("%s: %d cases are in no fold: %s", path, len(unused), shorten(sorted(unused)))
    return splits


def _parse_fold(path: Path, index: int, fold: Any, known: set[str]) -> Split:
    sides = {}
    for side in ("train", "val"):
        names = fold.get(side) if isinstance(fold, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path}: fold {index} needs a list of case ids under {side!r}")
        unknown = sorted(set(names) - known)
        if unknown:
            raise DataError(f"{path}: fold {index} names unknown cases in {side!r}: {shorten(unknown)}")
        if len(set(names)) < len(names):
            raise DataError(f"{path}: fold {index} names a case twice in {side!r}")
        sides[side] = tuple(sorted(names))
    overlap = sorted(set(sides["train"]) & set(sides["val"]))
    if overlap:
        raise DataError(f"{path}: fold {index} has cases in train and in val: {shorten(overlap)}")
    return Split(sides["train"], sides["val"])
