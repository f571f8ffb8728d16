"""Folders at any depth, without going round in circles and without passing over any in silence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def walk_folders(
    root: Path, *, unreadable: Callable[[Path, OSError], None]
) -> Iterator[tuple[Path, list[Path]]]:
    """``root`` and the folders below it with their files, in order of name; links are followed, once.

    Hidden files and folders are left out.

    Args:
        root: a folder.
        unreadable: called with each folder that cannot be listed, and why.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "patient" / "study").mkdir(parents=True)
        >>> (root / "patient" / "study" / "1.dcm").touch()
        >>> [(folder.name, len(files)) for folder, files in walk_folders(root, unreadable=print)][1:]
        [('patient', 0), ('study', 1)]
    """
    seen: set[Path] = set()

    def walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
        try:
            where = folder.resolve()
            if where in seen:
                return
            seen.add(where)
            with os.scandir(folder) as entries:
                found = sorted(
                    (entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name
                )
                files = [folder / entry.name for entry in found if entry.is_file()]
                inner = [folder / entry.name for entry in found if entry.is_dir()]
        except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError in older Pythons
            unreadable(folder, error if isinstance(error, OSError) else OSError(str(error)))
            return
        yield folder, files
        for one in inner:
            yield from walk(one)

    return walk(root)
