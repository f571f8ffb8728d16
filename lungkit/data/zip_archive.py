"""A zip of scans, as a PACS exports them, unpacked for as long as it is read; what it must not hold is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lungkit.errors import DataError, ResourceError, readable

MAX_FILES = 500_000
MAX_BYTES = 256 * 2**30
# A padded CT deflates to a twentieth; what unpacks to far more than that is made to fill a disk.
MAX_RATIO = 200
_HARMLESS_BYTES = 2**30
_CHUNK = 2**20
_ENCRYPTED = 0x1


@contextlib.contextmanager
def unpacked(path: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[Path]:
    """``path`` itself, or where it is a zip a temporary folder of its name with its files, removed afterwards.

    Files keep the time that the zip notes, so that what was predicted from them is known again. A zip within the zip
    stays as it is. Nothing is written outside of the folder, and sizes are checked before and while they are written.

    Args:
        path: file or folder.
        max_bytes: refuse a zip whose files are larger together.

    Raises:
        DataError: damaged, encrypted, compressed in a way that Python lacks, or not to be trusted: names that lead out
            of the folder or come twice, links, more than ``MAX_FILES`` files, or contents ``MAX_RATIO`` times as large.
        ResourceError: the disk for temporary files (TMPDIR) has no room.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with zipfile.ZipFile(folder / "export.zip", "w") as archive:
        ...     archive.writestr("STUDY/SERIES/1.dcm", b"")
        >>> with unpacked(folder / "export.zip") as root:
        ...     root.name, [file.relative_to(root).as_posix() for file in root.rglob("*.dcm")]
        ('export', ['STUDY/SERIES/1.dcm'])
    """
    if not path.is_file() or not is_zip(path):
        yield path
        return
    temporary = Path(tempfile.mkdtemp(prefix="lungkit-zip-"))
    try:
        root = temporary / (path.stem or "archive")
        root.mkdir()
        _unpack(path, root, max_bytes)
        yield root
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_zip(path: Path) -> bool:
    """Whether a file is a zip, by its content, or says so by its name."""
    try:
        return path.suffix.lower() == ".zip" or zipfile.is_zipfile(path)
    except OSError as error:
        raise DataError(f"{readable(path)}: cannot be read ({error.strerror})") from error


def _unpack(path: Path, root: Path, max_bytes: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            places = _places(path, members)
            _check_size(path, members, root, max_bytes)
            for member, place in zip(members, places, strict=True):
                _write(archive, member, root / place)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path.name}: a damaged zip ({error}); copy or export it again, or unpack it yourself"
        ) from error
    except NotImplementedError as error:
        raise DataError(f"{path.name}: {error}; unpack it yourself and name the folder") from error
    except OSError as error:
        raise ResourceError(
            f"{path.name}: cannot be unpacked to {root.parent} ({error.strerror or error}); free some space, or set "
            "TMPDIR to a folder on a larger disk"
        ) from error


def _places(path: Path, members: list[zipfile.ZipInfo]) -> list[PurePosixPath]:
    """Where each member goes below the root; the whole archive is refused for one that would go elsewhere."""
    if not members:
        raise DataError(f"{path.name}: the zip holds no file")
    if len(members) > MAX_FILES:
        raise DataError(f"{path.name}: the zip holds {len(members)} files, more than {MAX_FILES}; divide it")
    places: dict[PurePosixPath, str] = {}
    for member in members:
        name = readable(member.filename.replace("\\", "/"))
        place = PurePosixPath(name)
        if member.flag_bits & _ENCRYPTED:
            raise DataError(
                f"{path.name}: {name} is encrypted; unpack it with its password and name the folder"
            )
        if place.is_absolute() or ".." in place.parts or (place.parts and ":" in place.parts[0]):
            raise DataError(
                f"{path.name}: {name} would be written outside of its folder; do not trust this zip"
            )
        if stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(
                f"{path.name}: {name} is a link, which a zip of scans does not need; unpack it yourself"
            )
        if places.setdefault(place, name) is not name:
            raise DataError(f"{path.name}: {name} is there twice; export it again")
    return list(places)


def _check_size(path: Path, members: list[zipfile.ZipInfo], root: Path, max_bytes: int) -> None:
    total, packed = sum(member.file_size for member in members), path.stat().st_size
    if total > max_bytes:
        raise DataError(f"{path.name}: {total} bytes unpacked, more than {max_bytes}; unpack it yourself")
    if total > max(_HARMLESS_BYTES, MAX_RATIO * packed):
        raise DataError(
            f"{path.name}: {packed} bytes that say they unpack to {total}, over {MAX_RATIO} times as many, which no "
            "scans do; do not trust this zip"
        )
    free = shutil.disk_usage(root).free
    if total > free:
        raise ResourceError(
            f"{path.name}: {total} bytes unpacked, {free} free in {root.parent}; set TMPDIR to a folder "
            "on a larger disk"
        )


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    left = member.file_size
    with archive.open(member) as source, place.open("xb") as target:
        while chunk := source.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise zipfile.BadZipFile(f"{readable(member.filename)} is larger than the zip says")
            target.write(chunk)
    with contextlib.suppress(ValueError, OverflowError, OSError):  # a date that does not exist
        when = time.mktime((*member.date_time, 0, 0, -1))
        os.utime(place, (when, when))
