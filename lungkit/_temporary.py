"""Names of what is being written, which tell whether the process that writes is still there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

_NAME = re.compile(r"\.[0-9a-f]{8}-(?P<place>[0-9a-f]{6})-(?P<process>[0-9a-f]+)\.tmp-(?P<end>.*)", re.DOTALL)
_LONGEST = 50
_OLD_SECONDS = 24 * 3600


def temporary_name(final: Path) -> Path:
    """A name beside ``final`` that nobody else uses.

    A leading dot hides it from globs over cases; a random part keeps concurrent writers apart; the machine and the
    process tell later whether anybody still writes. Of a long name the end is kept: a name has no more than 255 bytes
    on most disks, and writers look at the suffix.
    """
    head = f".{uuid.uuid4().hex[:8]}-{_place()}-{os.getpid():x}"
    return final.with_name(f"{head}.tmp-{final.name[-_LONGEST:]}")


def remove_leftovers(
    folder: str | os.PathLike[str], names: Iterable[str] | None = None, *, depth: int = 2
) -> None:
    """Remove what killed processes were writing: files and folders under names of :func:`temporary_name`.

    What a living process of this machine writes stays, and what comes from another machine until it is a day old.

    Args:
        folder: where to look.
        names: final names whose leftovers go; None is all, in the folders below too.
        depth: how many levels of folders below to look into.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> mine = temporary_name(folder / "mask.nii.gz")
        >>> mine.touch()
        >>> remove_leftovers(folder)
        >>> mine.exists()
        True
    """
    ends = None if names is None else {name[-_LONGEST:] for name in names}
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError:
        return
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match is not None:
            if (ends is None or match["end"] in ends) and not _is_alive(
                match["place"], match["process"], entry
            ):
                _remove(Path(entry))
        elif ends is None and depth and entry.is_dir(follow_symlinks=False):
            remove_leftovers(entry, depth=depth - 1)


def _remove(path: Path) -> None:
    # What cannot be removed does no harm: nobody reads it.
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _is_alive(place: str, process: str, entry: os.DirEntry[str]) -> bool:
    if place == _place() and os.name != "nt":  # on Windows to ask this is to end the process
        try:
            os.kill(int(process, 16), 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:  # somebody else's process
            return True
        return True
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime < _OLD_SECONDS
    except OSError:
        return True


@functools.cache
def _place() -> str:
    """Where a process number means the same process: this machine since it was started, this container."""
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(
                Path(path).readlink().name if path.endswith("pid") else Path(path).read_text().strip()
            )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:6]
