"""Where preprocessed cases lie where nobody says, how much room they take, and removing those that are not used."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from lungkit.errors import UsageError

_LOG = logging.getLogger("lungkit")

_ADVICE = "name a folder with --data.cache or XDG_CACHE_HOME"
_DAY_SECONDS = 24 * 3600


def default_cache_folder() -> Path:
    """lungkit's folder in the user's cache directory; where that cannot be written, one of temporary files, said once.

    Raises:
        UsageError: no folder can be written.
    """
    return _writable_folder(os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))


class CacheUse(NamedTuple):
    """Preprocessed cases and the bytes that they take on the disk."""

    cases: int
    bytes: int


def cache_use(folder: Path) -> CacheUse:
    """What a cache folder holds.

    Example:
        >>> cache_use(Path("absent"))
        CacheUse(cases=0, bytes=0)
    """
    sizes = [_size(entry) for entry in _entries(folder)]
    return CacheUse(len(sizes), sum(sizes))


def prune_cache(folder: Path, *, unused_days: float) -> CacheUse:
    """Remove the cases that no run has opened for ``unused_days``; a run that needs one again makes it again.

    Returns:
        What was removed.

    Raises:
        UsageError: a case cannot be removed.
    """
    newest = time.time() - unused_days * _DAY_SECONDS
    doomed = [entry for entry in _entries(folder) if (entry / "case.json").stat().st_mtime <= newest]
    sizes = [_size(entry) for entry in doomed]
    for entry in doomed:
        try:
            shutil.rmtree(entry)
        except OSError as error:
            raise UsageError(f"{entry}: cannot be removed ({error.strerror}); whose cache is it?") from error
    return CacheUse(len(sizes), sum(sizes))


@functools.cache  # the sentence about a temporary folder is said once
def _writable_folder(cache_home: str | None, home: str | None) -> Path:
    try:
        base = Path(cache_home) if cache_home else Path.home() / ".cache"
        folder = base / "lungkit"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        found = f"{folder} cannot be written ({error.strerror})"
    except RuntimeError:
        found = "this user has no home folder"
    try:
        temporary = _temporary_folder()
    except OSError as error:
        raise UsageError(f"no place for preprocessed cases: {found}; {_ADVICE}") from error
    _LOG.warning("%s: preprocessed cases are kept in %s until it is cleared; %s", found, temporary, _ADVICE)
    return temporary


def _temporary_folder() -> Path:
    """A folder of this user alone, the same one each time; a new one where somebody else has taken its name."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"lungkit-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == user:
        return folder
    return Path(tempfile.mkdtemp(prefix="lungkit-"))


def _entries(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("cases/*/case.json"))


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.iterdir())
