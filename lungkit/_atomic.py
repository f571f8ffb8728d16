"""Writing files so that a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lungkit.errors import ResourceError, UsageError, is_full

_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}


@contextlib.contextmanager
def atomic_path(final: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path next to ``final``; on success it becomes ``final``, on failure it is removed.

    The temporary name ends as that of ``final`` does, so that writers which look at the suffix
    (``numpy.save``, nibabel) behave as they would with the final name. File and folder are flushed to the
    disk before the name changes hands, unless ``durable`` is false: then a power cut may lose the file, which
    is good enough for what can be made again and costs no wait for the disk.

    Raises:
        ResourceError: the disk or the quota is full.
        UsageError: the folder does not exist or cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_path(folder / "report.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> (folder / "report.txt").read_text()
        'whole'
    """
    final = Path(final)
    temporary = _temporary_name(final)
    try:
        yield temporary
        if durable:
            flush(temporary)
        temporary.replace(final)
        if durable:
            flush(final.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        translated = _translate(error, temporary, final)
        if translated is not None:
            raise translated from error
        raise


@contextlib.contextmanager
def atomic_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty temporary folder next to ``final``; on success it becomes ``final``, else it is removed.

    Where another process has put ``final`` there in the meantime, theirs stays and ours is removed. Nothing
    is flushed to the disk: this is for what can be made again, and its reader must check it.

    Raises:
        ResourceError: the disk or the quota is full.
        UsageError: the parent folder does not exist or cannot be written.
    """
    final = Path(final)
    temporary = _temporary_name(final)
    try:
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        translated = _translate(error, temporary, final)
        if translated is not None:
            raise translated from error
        raise


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Make ``folder`` and what leads to it; one that exists is left as it is.

    Raises:
        UsageError: it cannot be made.
        ResourceError: the disk is full.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full(error):
            raise ResourceError(
                f"{folder}: cannot be made, the disk or quota is full; free some space and run again"
            ) from error
        raise UsageError(
            f"{folder}: cannot be made ({error.strerror}); name a folder that can be written"
        ) from error


def claim_folder(
    folder: str | os.PathLike[str],
    record: str,
    content: Mapping[str, Any],
    *,
    holds: str,
    overwrite: bool = False,
    advice: str = "name another folder",
) -> None:
    """Make ``folder`` and note in its file ``record`` what it is for; or go on in one that notes the same.

    Args:
        folder: made with what leads to it.
        record: name of a file in it.
        content: what is noted, as JSON.
        holds: what such folders hold, in the plural, for the messages.
        overwrite: take the folder whatever it holds.
        advice: what to do where the folder is not ours, for the messages.

    Raises:
        UsageError: it holds other files, or notes something else; says which entries differ. It cannot be made.
        ResourceError: the disk is full.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "out"
        >>> claim_folder(folder, "made.json", {"seed": 0}, holds="scans")
        >>> claim_folder(folder, "made.json", {"seed": 1}, holds="scans")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lungkit.errors.UsageError: .../out holds scans made with other seed (see made.json there); name another folder
    """
    folder = Path(folder)
    path = folder / record
    if not overwrite and path.is_file():
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise UsageError(f"{path}: not readable as JSON ({error}); {advice}") from error
        wanted = json.loads(json.dumps(content))
        if found != wanted:
            known = found if isinstance(found, dict) else {}
            different = sorted(key for key in {*wanted, *known} if wanted.get(key) != known.get(key))
            raise UsageError(
                f"{folder} holds {holds} made with other {', '.join(different)} (see {record} there); {advice}"
            )
        return
    make_folder(folder)
    if not overwrite and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no {holds} of lungkit; {advice}")
    write_json_atomic(path, content)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder; its rename is already journalled
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not know fsync of a folder
            raise
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` through :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` through :func:`atomic_path`."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write ``value`` as JSON to ``path`` through :func:`atomic_path`; NaN is refused, as JSON has none."""
    write_text_atomic(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def _temporary_name(final: Path) -> Path:
    # A leading dot hides it from globs over cases; a random part keeps concurrent writers apart. Of a long name the end
    # is kept: a name has no more than 255 bytes on most disks, and writers look at the suffix.
    return final.with_name(f".{uuid.uuid4().hex[:12]}.tmp-{final.name[-50:]}")


def _translate(error: BaseException, temporary: Path, final: Path) -> Exception | None:
    """The error to raise in place of ``error``, or None where it is not about writing this file."""
    if is_full(error):
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            return ResourceError(f"{final}: not written, it would be larger than a limit allows (ulimit -f)")
        return ResourceError(
            f"{final}: not written, the disk or quota is full ({error}); free some space and run again"
        )
    if isinstance(error, OSError) and error.errno in _REFUSED:
        mine = {str(temporary), str(final), str(final.parent)}
        if {str(error.filename), str(error.filename2)} & mine:
            return UsageError(
                f"{final}: cannot be written ({error.strerror}); name a folder that exists and is writable"
            )
    return None
