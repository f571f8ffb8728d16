"""A dataset of phantoms on disk, in nnU-Net's raw layout."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lungkit._atomic import claim_folder, make_folder, write_json_atomic
from lungkit.data.phantom.generate import Phantom, make_phantom
from lungkit.data.splits import Split, write_splits
from lungkit.data.volume import write_nifti
from lungkit.errors import UsageError

_RECORD = "phantom.json"
_FORMAT = 1
_FOLDS = 5
_DECLARED: dict[str, dict[str, object]] = {
    "tumour": {"labels": {"background": 0, "tumour": 1}},
    "organs": {"labels": {"background": 0, "lung": 1, "heart": 2, "tumour": 3}},
    "regions": {
        "labels": {"background": 0, "lung": [1, 3], "heart": 2, "tumour": 3},
        "regions_class_order": [1, 2, 3],
    },
}
PHANTOM_LABELS = tuple(_DECLARED)
"""What masks of phantoms may hold."""


def write_phantom_dataset(
    root: str | os.PathLike[str],
    *,
    cases: int,
    shape: Sequence[int],
    dims: int = 3,
    seed: int = 0,
    labels: str = "tumour",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``cases`` phantoms to ``root`` as a dataset that :func:`lungkit.data.open_dataset` reads.

    ``imagesTr/phantom_0000_0000.nii.gz`` holds int16 HU and ``labelsTr/phantom_0000.nii.gz`` the mask, both
    with the phantom's spacing; case i is :func:`make_phantom` of the i-th seed that ``seed`` spawns, so a
    larger dataset begins with the cases of a smaller one. ``splits_final.json`` parts the cases into five
    folds (fewer where there are fewer cases).

    Every file appears whole or not at all, and ``dataset.json`` last: a dataset that has one is complete.
    Called again after an interruption, it makes what is missing.

    Args:
        root: folder to write to; made where absent.
        cases: how many, at least 2.
        shape: voxels, (Y, X) or (1, Y, X) with ``dims`` 2, (Z, Y, X) with ``dims`` 3.
        dims: 2 writes single slices, 3 volumes.
        seed: non-negative integer.
        labels: "tumour" alone; "organs": lung, heart and tumour, which exclude each other; or "regions": the same
            masks, declared so that the lung is the lung with its tumours.
        progress: called with (cases done, cases in all).

    Returns:
        ``root``.

    Raises:
        UsageError: an argument is out of range, or ``root`` holds another dataset.
        ResourceError: the disk is full.

    Example:
        >>> import tempfile
        >>> from lungkit.data import open_dataset
        >>> root = write_phantom_dataset(tempfile.mkdtemp(), cases=2, shape=(64, 64), dims=2)
        >>> dataset = open_dataset(root)
        >>> dataset.num_classes, [case.case_id for case in dataset.cases]
        (2, ['phantom_0000', 'phantom_0001'])
    """
    root = Path(root)
    size = _checked_shape(shape, dims)
    if operator.index(cases) < 2:
        raise UsageError(f"cases is {cases}; training and validation need at least 2")
    if operator.index(seed) < 0:
        raise UsageError(f"seed is {seed}; give a non-negative integer")
    if labels not in _DECLARED:
        raise UsageError(f"labels is {labels!r}; there are {', '.join(PHANTOM_LABELS)}")
    record = {"format": _FORMAT, "cases": int(cases), "shape": list(size), "dims": dims, "seed": int(seed)}
    if labels != "tumour":
        record["labels"] = labels
    claim_folder(root, _RECORD, record, holds="phantoms")
    for folder in ("imagesTr", "labelsTr"):
        make_folder(root / folder)
    if (root / "dataset.json").is_file():
        return root
    names = [f"phantom_{index:04d}" for index in range(cases)]
    seeds = np.random.SeedSequence(seed).generate_state(cases, np.uint32).tolist()
    for done, (name, case_seed) in enumerate(zip(names, seeds, strict=True), start=1):
        image, label = root / "imagesTr" / f"{name}_0000.nii.gz", root / "labelsTr" / f"{name}.nii.gz"
        if not (image.is_file() and label.is_file()):
            phantom = make_phantom(case_seed, shape=size)
            write_nifti(image, phantom.image.transpose(2, 1, 0), phantom.affine)
            write_nifti(label, _mask(phantom, labels).transpose(2, 1, 0), phantom.affine)
        if progress is not None:
            progress(done, cases)
    write_splits(root, _folds(names))
    write_json_atomic(
        root / "dataset.json",
        {
            "name": "lungkit chest phantoms",
            "description": "synthetic chest CT in HU with tumours; no patient data",
            "channel_names": {"0": "CT"},
            **_DECLARED[labels],
            "numTraining": int(cases),
            "file_ending": ".nii.gz",
        },
    )
    return root


def _mask(phantom: Phantom, labels: str) -> np.ndarray:
    if labels == "tumour":
        return phantom.label
    mask = phantom.lungs.copy()
    mask[phantom.heart == 1] = 2
    mask[phantom.label == 1] = 3
    return mask


def _folds(names: list[str]) -> list[Split]:
    folds = min(_FOLDS, len(names))
    return [
        Split(
            train=tuple(name for index, name in enumerate(names) if index % folds != fold),
            val=tuple(names[fold::folds]),
        )
        for fold in range(folds)
    ]


def _checked_shape(shape: Sequence[int], dims: int) -> tuple[int, ...]:
    size = tuple(operator.index(length) for length in shape)
    if dims not in (2, 3):
        raise UsageError(f"dims is {dims!r}; give 2 for slices or 3 for volumes")
    if dims == 2 and len(size) == 2:
        size = (1, *size)
    if len(size) != 3 or (dims == 2 and size[0] != 1):
        raise UsageError(f"shape is {tuple(shape)}; give {'(Y, X)' if dims == 2 else '(Z, Y, X)'} in voxels")
    return size
