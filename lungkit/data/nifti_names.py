"""Names of NIfTI files: suffix, case and channel number, and the files of a folder by them."""

from __future__ import annotations

import os
import re
import unicodedata
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


def problem_of_name(path: Path) -> str | None:
    r"""Why a name cannot be used, or None; results carry it in JSON, tables and pictures.

    Example:
        >>> problem_of_name(Path(os.fsdecode(b"L\xe4sion.nii.gz")))
        "its name is not UTF-8 (b'L\\xe4sion.nii.gz'); rename it"
    """
    try:
        path.name.encode()
    except UnicodeEncodeError:
        return f"its name is not UTF-8 ({os.fsencode(path.name)!r}); rename it"
    return None


def nifti_files(
    folder: Path, suffix: str | None = None, *, passed_over: dict[Path, str] | None = None
) -> list[tuple[str, Path]]:
    """(name without suffix, path) of the NIfTI files in ``folder``, sorted.

    Names are normalised (Unicode NFC): a Mac and a PC write the same letter in two ways.

    Args:
        folder: hidden files in it are left out; one that does not exist holds none.
        suffix: of the files that are meant, in lower case; None: any.
        passed_over: where to note files whose name cannot be used, and why.

    Raises:
        DataError: such a file, where ``passed_over`` is None.
    """
    if not folder.is_dir():
        return []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
    found = []
    for path in entries:
        stem, ending = split_suffix(path.name)
        if not is_nifti(path.name) or suffix not in (None, ending.lower()):
            continue
        problem = problem_of_name(path)
        if problem is None:
            found.append((unicodedata.normalize("NFC", stem), path))
        elif passed_over is None:
            raise DataError(f"{folder}: a file cannot be used: {problem}")
        else:
            passed_over[path] = problem
    return found


def nifti_by_stem(folder: Path, suffix: str | None = None) -> dict[str, Path]:
    """The NIfTI files in ``folder`` by their name without suffix.

    Raises:
        DataError: two files differ in their suffix, or in the Unicode form of their names, only.
    """
    files = nifti_files(folder, suffix)
    repeated = [name for name, count in Counter(name for name, _ in files).items() if count > 1]
    if repeated:
        raise DataError(
            f"{folder}: {shorten(repeated)} exist with two suffixes (.nii, .nii.gz) or in two Unicode forms; "
            "keep one of each"
        )
    return dict(files)
