"""Which scans a path holds: NIfTI files with their channels, or DICOM series."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lungkit.data.folders import walk_folders
from lungkit.data.nifti_names import is_nifti, nifti_files, problem_of_name, split_channel, split_suffix
from lungkit.data.volume import DEFAULT_MAX_VOXELS, NanPolicy, Volume, read_volume
from lungkit.errors import DataError, UsageError, shorten

if TYPE_CHECKING:
    from lungkit.data.dicom import DicomScan

_LOG = logging.getLogger("lungkit")


@dataclass(frozen=True, eq=False)
class LoadedScan:
    """The channels of a scan; ``dicom`` where it came from a series, for objects that refer to it."""

    volumes: tuple[Volume, ...]
    dicom: DicomScan | None = None


@dataclass(frozen=True)
class ScanInput:
    """One scan on disk: the files of its channels in order, or the folder of a DICOM series."""

    name: str
    paths: tuple[Path, ...]
    is_dicom: bool = False
    series: str | None = None

    def load(
        self, *, max_voxels: int = DEFAULT_MAX_VOXELS, nan_policy: NanPolicy = NanPolicy.REFUSE
    ) -> LoadedScan:
        """Read it.

        Raises:
            DataError: it cannot be used.
        """
        if self.is_dicom:
            from lungkit.data.dicom import read_series

            scan = read_series(self.paths[0], series=self.series, max_voxels=max_voxels)
            return LoadedScan((scan.volume,), scan)
        volumes = (read_volume(path, max_voxels=max_voxels, nan_policy=nan_policy) for path in self.paths)
        return LoadedScan(tuple(volumes))

    def fingerprint(self) -> str:
        """Changes when a file is replaced: a hash of names, sizes and times, without reading the files.

        Raises:
            DataError: a file is gone.
        """
        digest = hashlib.sha256(repr(self.series).encode())
        try:
            for path in self.paths:
                files = (
                    sorted(entry for entry in path.iterdir() if entry.is_file()) if self.is_dicom else [path]
                )
                for file in files:
                    status = file.stat()
                    digest.update(
                        os.fsencode(file.name) + f" {status.st_size} {status.st_mtime_ns}\n".encode()
                    )
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        return digest.hexdigest()


@dataclass(frozen=True)
class FoundScans:
    """Scans with different names, sorted by them, and what was passed over, with the reason."""

    scans: tuple[ScanInput, ...]
    passed_over: dict[Path, str]


def find_scans(path: Path, *, channels: int = 1, series: str | None = None) -> FoundScans:
    """The scans at ``path``: NIfTI files, DICOM series, or both.

    A NIfTI file is one scan. In a folder, files NAME_0000.nii.gz, NAME_0001.nii.gz, ... are the channels of one scan
    NAME, as nnU-Net has them; numbers that do not begin at 0000 (patient_0001, p0_2019) are a part of the name.
    A folder that holds DICOM images is a series, at any depth; it is called like its folder, or like the path that
    leads to it where several folders have one name.

    Args:
        path: file or folder.
        channels: that the model takes.
        series: which series of a DICOM folder.

    Raises:
        DataError: there is no scan.
        UsageError: two scans of one name, or ``series`` without DICOM.
    """
    passed_over: dict[Path, str] = {}
    if path.is_file():
        scans = [_single_file(path, channels)]
    elif path.is_dir():
        scans = [*_nifti_scans(path, passed_over), *_dicom_scans(path, series, passed_over)]
    else:
        raise DataError(f"{path}: no such file or folder")
    if not scans:
        reasons = [f"{one}: {why}" for one, why in passed_over.items()]
        raise DataError(
            f"{path}: no scan found; expected .nii or .nii.gz files, or folders with DICOM series"
            f"{'; ' if reasons else ''}{shorten(reasons)}"
        )
    if series is not None and not any(scan.is_dicom for scan in scans):
        raise UsageError(f"--series {series} chooses among DICOM series, but {path} holds NIfTI")
    by_name: dict[str, ScanInput] = {}
    for scan in scans:
        other = by_name.setdefault(scan.name, scan)
        if other is not scan:
            raise UsageError(
                f"{other.paths[0]} and {scan.paths[0]} would both be written as {scan.name!r}; rename one of them"
            )
    _LOG.info("%s: %d scan%s", path, len(scans), "" if len(scans) == 1 else "s")
    return FoundScans(tuple(by_name[name] for name in sorted(by_name)), passed_over)


def _single_file(path: Path, channels: int) -> ScanInput:
    if not is_nifti(path.name):
        hint = (
            "; name the folder that holds the series"
            if _is_dicom(path)
            else "; expected .nii or .nii.gz, or a folder"
        )
        raise DataError(f"{path}: not a NIfTI file{hint}")
    problem = problem_of_name(path)
    if problem is not None:
        raise DataError(f"the input cannot be used: {problem}")
    stem = split_suffix(path.name)[0]
    name, channel = split_channel(stem)
    if channel != 0:
        return ScanInput(stem, (path,))
    if channels == 1:
        return ScanInput(name, (path,))  # the first channel stands for the scan
    siblings = [one for one in _nifti_scans(path.parent, {}) if path in one.paths]
    return siblings[0] if siblings else ScanInput(name, (path,))


def _nifti_scans(folder: Path, passed_over: dict[Path, str]) -> list[ScanInput]:
    groups: dict[str, dict[int, tuple[str, Path]]] = {}
    scans = []
    for stem, path in nifti_files(folder, passed_over=passed_over):
        name, channel = split_channel(stem)
        if channel is None:
            scans.append(ScanInput(stem, (path,)))
        elif channel in (group := groups.setdefault(name, {})):
            raise UsageError(
                f"{group[channel][1]} and {path} would both be written as {stem!r}; rename one of them"
            )
        else:
            group[channel] = stem, path
    for name, group in groups.items():
        numbers = sorted(group)
        paths = tuple(group[number][1] for number in numbers)
        if 0 not in group:
            scans += [ScanInput(stem, (path,)) for stem, path in group.values()]
        elif numbers == list(range(len(numbers))):
            scans.append(ScanInput(name, paths))
        else:
            absent = min(set(range(len(numbers))) - set(numbers))
            for path in paths:
                passed_over[path] = f"a channel of {name}, of which {name}_{absent:04d} is missing"
    return scans


def _dicom_scans(root: Path, series: str | None, passed_over: dict[Path, str]) -> list[ScanInput]:
    def unreadable(folder: Path, error: OSError) -> None:
        passed_over[folder] = f"cannot be listed ({error.strerror or error})"

    folders = []
    for folder, files in walk_folders(root, unreadable=unreadable):
        if folder != root:
            for path in files:
                if is_nifti(path.name):
                    passed_over[path] = "NIfTI below the folder that was given; name its own folder"
        if _holds_scan(files, passed_over):
            problem = problem_of_name(folder)
            if problem is None:
                folders.append(folder)
            else:
                passed_over[folder] = problem
    count = Counter(folder.name for folder in folders)
    scans = []
    for folder in folders:
        if folder == root:
            name = root.resolve().name
        else:
            name = folder.name if count[folder.name] == 1 else "_".join(folder.relative_to(root).parts)
        scans.append(ScanInput(unicodedata.normalize("NFC", name), (folder,), is_dicom=True, series=series))
    return scans


def _holds_scan(files: Sequence[Path], passed_over: dict[Path, str]) -> bool:
    """Whether one of the files is a DICOM image, or cannot be read: then reading the series will say why."""
    for path in files:
        if not is_nifti(path.name) and _is_dicom(path, passed_over):
            from lungkit.data.dicom.files import is_image, read_header

            try:
                if is_image(read_header(path)):
                    return True
            except DataError:
                return True
    return False


def _is_dicom(path: Path, passed_over: dict[Path, str] | None = None) -> bool:
    """Whether the file says it is DICOM, after its preamble or by its name, and is no list of others."""
    if path.name.upper() == "DICOMDIR":
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima")
    except OSError as error:
        if passed_over is not None:
            passed_over[path] = f"cannot be read ({error.strerror})"
        return False


def share_of(scans: Sequence[ScanInput], index: int, count: int) -> list[ScanInput]:
    """Every ``count``-th scan from ``index`` on: together the shares hold each scan once.

    Example:
        >>> [scan.name for scan in share_of([ScanInput(n, ()) for n in "abcde"], 1, 2)]
        ['b', 'd']
    """
    if not 0 <= index < count:
        raise UsageError(f"shard {index}/{count}: the first number must be from 0 to {count - 1}")
    return list(scans[index::count])
