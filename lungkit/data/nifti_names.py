"""Names of NIfTI files: suffix, case and channel number, and the files of a folder by them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from lungkit.errors import DataError, shorten

SUFFIXES = (".nii.gz", ".nii")
"""Endings of the names, which count in any case."""

_CHANNEL = re.compile(r"(.+)_([0-9]{4})")


def split_suffix(name: str) -> tuple[str, str]:
    """Name without its suffix, and the suffix as it is written; that is empty where it is none of :data:`SUFFIXES`.

    Example:
        >>> split_suffix("a.b.NII.gz"), split_suffix("notes.txt")
        (('a.b', '.NII.gz'), ('notes.txt', ''))
    """
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], name[-len(suffix) :]
    return name, ""


def is_nifti(name: str) -> bool:
    """Whether ``name`` ends as that of a NIfTI file does, and is not hidden."""
    return bool(split_suffix(name)[1]) and not name.startswith(".")


def split_channel(stem: str) -> tuple[str, int | None]:
    """Case and channel number of nnU-Net's ``<case>_0000``; the number is None where there is none.

    Example:
        >>> split_channel("lung_007_0001"), split_channel("lung_007")
        (('lung_007', 1), ('lung_007', None))
    """
    match = _CHANNEL.fullmatch(stem)
    return (match[1], int(match[2])) if match else (stem, None)


def nifti_files(folder: Path, suffix: str | None = None) -> list[tuple[str, Path]]:
    """(name without suffix, path) of the NIfTI files in ``folder``, sorted; of one suffix where that is given."""
    if not folder.is_dir():
        return []
    found = [(*split_suffix(path.name), path) for path in sorted(folder.iterdir()) if is_nifti(path.name)]
    return [(stem, path) for stem, ending, path in found if suffix in (None, ending.lower())]


def nifti_by_stem(folder: Path) -> dict[str, Path]:
    """The NIfTI files in ``folder`` by their name without suffix.

    Raises:
        DataError: two files differ in their suffix only.
    """
    files = nifti_files(folder)
    repeated = [name for name, count in Counter(name for name, _ in files).items() if count > 1]
    if repeated:
        raise DataError(
            f"{folder}: {shorten(repeated)} exist with two suffixes (.nii, .nii.gz); keep one of each"
        )
    return dict(files)
