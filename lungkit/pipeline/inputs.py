"""Which scans a path holds: NIfTI files with their channels, or DICOM series."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lungkit.data.nifti_names import is_nifti, nifti_files, split_channel, split_suffix
from lungkit.data.volume import DEFAULT_MAX_VOXELS, Volume, read_volume
from lungkit.errors import DataError, UsageError

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

    def load(self, *, max_voxels: int = DEFAULT_MAX_VOXELS) -> LoadedScan:
        """Read it.

        Raises:
            DataError: it cannot be used.
        """
        if self.is_dicom:
            from lungkit.data.dicom import read_series

            scan = read_series(self.paths[0], series=self.series, max_voxels=max_voxels)
            return LoadedScan((scan.volume,), scan)
        return LoadedScan(tuple(read_volume(path, max_voxels=max_voxels) for path in self.paths))

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
                    digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        return digest.hexdigest()


def find_scans(path: Path, *, channels: int = 1, series: str | None = None) -> list[ScanInput]:
    """The scans at ``path``, sorted by name.

    A NIfTI file is one scan. In a folder, files NAME_0000.nii.gz, NAME_0001.nii.gz, ... are the channels of one scan
    NAME, as nnU-Net has them, and any other NIfTI file is a scan of its own. A folder without NIfTI files is a DICOM
    series if it holds DICOM files, else a folder of such folders; a series is called like its folder.

    Args:
        path: file or folder.
        channels: that the model takes.
        series: which series of a DICOM folder.

    Raises:
        DataError: there is no scan.
        UsageError: two scans of one name, or ``series`` without DICOM.
    """
    if path.is_file():
        scans = [_single_file(path, channels)]
    elif path.is_dir():
        scans = _nifti_scans(path) or _dicom_scans(path, series)
    else:
        raise DataError(f"{path}: no such file or folder")
    if not scans:
        raise DataError(
            f"{path}: no scan found; expected .nii or .nii.gz files, a folder with a DICOM series, or a folder of such "
            "folders"
        )
    if series is not None and not any(scan.is_dicom for scan in scans):
        raise UsageError(f"--series {series} chooses among DICOM series, but {path} holds NIfTI")
    _LOG.info("%s: %d scan%s", path, len(scans), "" if len(scans) == 1 else "s")
    return scans


def _single_file(path: Path, channels: int) -> ScanInput:
    if not is_nifti(path.name):
        hint = (
            "; name the folder that holds the series"
            if _is_dicom(path)
            else "; expected .nii or .nii.gz, or a folder"
        )
        raise DataError(f"{path}: not a NIfTI file{hint}")
    stem = split_suffix(path.name)[0]
    name, channel = split_channel(stem)
    if channel == 0:
        siblings = {scan.name: scan for scan in _nifti_scans(path.parent)}
        scan = siblings[name]
        # The first channel stands for the scan; a model of one channel takes it alone.
        return scan if channels > 1 else ScanInput(scan.name, scan.paths[:1])
    return ScanInput(stem, (path,))


def _nifti_scans(folder: Path) -> list[ScanInput]:
    groups: dict[str, dict[int | None, Path]] = {}
    for stem, path in nifti_files(folder):
        name, channel = split_channel(stem)
        group = groups.setdefault(name, {})
        if group and (channel is None or None in group or channel in group):
            other = next(iter(group.values()))
            raise UsageError(f"{other} and {path} would both be written as {name!r}; rename one of them")
        group[channel] = path
    return [ScanInput(name, tuple(group.values())) for name, group in sorted(groups.items())]


def _dicom_scans(folder: Path, series: str | None) -> list[ScanInput]:
    if _holds_dicom(folder):
        return [ScanInput(folder.resolve().name, (folder,), is_dicom=True, series=series)]
    found = []
    for inner in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        if _holds_dicom(inner):
            found.append(ScanInput(inner.name, (inner,), is_dicom=True, series=series))
    return found


def _holds_dicom(folder: Path) -> bool:
    return any(_is_dicom(path) for path in sorted(folder.iterdir()) if path.is_file())


def _is_dicom(path: Path) -> bool:
    """Whether the file says it is DICOM, after its preamble or by its name."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima")
    except OSError:
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
