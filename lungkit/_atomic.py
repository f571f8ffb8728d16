"""Writing files so that a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lungkit._reading import read_json
from lungkit._temporary import remove_leftovers, temporary_name
from lungkit.errors import ResourceError, UsageError, final_name, is_full, reason_of_full

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
    temporary = temporary_name(final)
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
    is flushed to the disk: this is for what can be made again, and its reader must check it. What killed processes
    were writing under this name is removed first.

    Raises:
        ResourceError: the disk or the quota is full.
        UsageError: the parent folder does not exist or cannot be written.
    """
    final = Path(final)
    temporary = temporary_name(final)
    remove_leftovers(final.parent, [final.name])
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


@contextlib.contextmanager
def new_folder(names: Iterable[str | os.PathLike[str]]) -> Iterator[NewFolder]:
    """Give an empty temporary folder; on success it takes the first of ``names`` that is free, else it is removed.

    Free is a name that nothing has, or an empty folder. What killed processes were writing under the first name is
    removed before. The parent folder is made.

    Raises:
        UsageError: no name is free, or the parent folder cannot be written; nothing is left there.
        ResourceError: the disk is full.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for _ in range(2):
        ...     with new_folder([root / "run", root / "run-2"]) as new:
        ...         _ = (new.path / "config.yaml").write_text("seed: 0")
        ...     new.path.name
        'run'
        'run-2'
    """
    candidates = map(_with_a_name, names)
    first = next(candidates)
    make_folder(first.absolute().parent)
    remove_leftovers(first.parent, [first.name])
    new = NewFolder(temporary_name(first))
    final = first
    try:
        new.path.mkdir()
        yield new
        for final in itertools.chain([first], candidates):
            if _take_name(new.path, final):
                new.path = final
                return
        raise UsageError(f"{final} exists and is not an empty folder; name a new one")
    except BaseException as error:
        shutil.rmtree(new.path, ignore_errors=True)
        translated = _translate(error, new.path, final)
        if translated is not None:
            raise translated from error
        raise


def check_new(folder: str | os.PathLike[str]) -> None:
    """Refuse, before any work, a folder that :func:`new_folder` would refuse after it.

    Raises:
        UsageError: it holds something, or is a file.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; name a new one")


@dataclass
class NewFolder:
    """Where a folder is: under a temporary name inside the block of :func:`new_folder`, under its own afterwards."""

    path: Path


def _take_name(temporary: Path, final: Path) -> bool:
    """Give a folder its name, unless that is another's."""
    try:
        if not final.is_dir() or not final.samefile("."):
            temporary.rename(final)  # takes the place of an empty folder too, but on Windows
            return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EBUSY, errno.EACCES):
            raise
        if error.errno == errno.EACCES and os.name != "nt":
            raise
    # The current folder and one where a disk is mounted stay where they are; what they are to hold moves in.
    if not final.is_dir() or any(final.iterdir()):
        return False
    for path in temporary.iterdir():
        path.rename(final / path.name)
    temporary.rmdir()
    return True


def _with_a_name(folder: str | os.PathLike[str]) -> Path:
    """The folder itself where the path is a link, or says "here"."""
    path = Path(folder)
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


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
                f"{final_name(folder)}: cannot be made, {reason_of_full(error)}; free some space and run again"
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

    A folder that is absent appears with its record in it: no kill leaves one that nobody knows, and of two
    processes that make it at once each goes on in it. What killed processes were writing in it is removed.

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
    if overwrite:
        make_folder(folder)
        write_json_atomic(path, content)
    elif not folder.exists():
        make_folder(folder.absolute().parent)
        with atomic_folder(folder) as temporary:
            write_json_atomic(temporary / record, content)
    elif not path.is_file():
        make_folder(folder)
        strangers = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        # Asked again: another process may have made it just now.
        if strangers and not path.is_file():
            raise UsageError(f"{folder} is not empty and holds no {holds} of lungkit; {advice}")
        _write_first(path, content)
    remove_leftovers(folder)
    try:
        found = read_json(path)
    except ValueError as error:
        raise UsageError(f"{path}: not readable as JSON ({error}); {advice}") from error
    wanted = json.loads(json.dumps(content))
    if found != wanted:
        known = found if isinstance(found, dict) else {}
        different = sorted(key for key in {*wanted, *known} if wanted.get(key) != known.get(key))
        raise UsageError(
            f"{folder} holds {holds} made with other {', '.join(different)} (see {record} there); {advice}"
        )


def _write_first(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON to ``path`` unless another process has done so meanwhile: theirs stays."""
    temporary = temporary_name(path)
    write_json_atomic(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _translate(error: BaseException, temporary: Path, final: Path) -> Exception | None:
    """The error to raise in place of ``error``, or None where it is not about writing this file."""
    if is_full(error):
        return ResourceError(
            f"{final_name(final)}: not written, {reason_of_full(error)} ({error}); free some space and run again"
        )
    if isinstance(error, OSError) and error.errno in _REFUSED:
        mine = {str(temporary), str(final), str(final.parent)}
        if {str(error.filename), str(error.filename2)} & mine:
            return UsageError(
                f"{final_name(final)}: cannot be written ({error.strerror}); name a folder that exists and is writable"
            )
    return None
