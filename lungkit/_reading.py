"""Small files from elsewhere: of a bounded size, and nothing that could be read for ever."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20
"""Larger than the JSON of any dataset, model or report of lungkit."""

_DEEPEST = 64


def check_regular(path: str | os.PathLike[str]) -> int:
    """Size of a file, in bytes.

    Raises:
        OSError: it is not there, or cannot be looked at.
        ValueError: it is a folder, or a pipe or a device, which could be read for ever.
    """
    status = os.stat(path)  # noqa: PTH116  # of what a link points to
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{Path(path).name} is not a regular file")
    return status.st_size


def read_bytes(path: str | os.PathLike[str], *, most_bytes: int = MOST_BYTES) -> bytes:
    """The contents of a regular file of at most ``most_bytes``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or larger.
    """
    size = check_regular(path)
    if size <= most_bytes:
        with Path(path).open("rb") as file:
            content = file.read(most_bytes + 1)  # it may have grown
        size = len(content)
    if size > most_bytes:
        raise ValueError(f"{Path(path).name} has {size} bytes, more than the {most_bytes} that are read")
    return content


def read_text(
    path: str | os.PathLike[str],
    *,
    most_bytes: int = MOST_BYTES,
    encoding: str = "utf-8",
    errors: str = "strict",
) -> str:
    """The same as text, with line ends as they are in Python.

    Raises:
        OSError: it cannot be read.
        ValueError: as :func:`read_bytes`, or it is not text in this encoding.
    """
    text = read_bytes(path, most_bytes=most_bytes).decode(encoding, errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], *, most_bytes: int = MOST_BYTES) -> Any:
    """What a JSON file holds, at most 64 levels deep.

    Raises:
        OSError: it cannot be read.
        ValueError: as :func:`read_bytes`, or it is not JSON, or deeper, or text in it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "deep.json"
        >>> _ = path.write_text("[" * 1000 + "]" * 1000)
        >>> read_json(path)
        Traceback (most recent call last):
        ValueError: deep.json is nested more than 64 levels deep
    """
    content = read_bytes(path, most_bytes=most_bytes)
    try:
        found = json.loads(content)
        if b"\\ud" in content.lower():  # a pair stands for one letter, and half of one for none
            json.dumps(found, ensure_ascii=False).encode()
        level = [[found]]
        for _ in range(_DEEPEST + 1):
            level = [
                list(inner.values()) if isinstance(inner, dict) else inner
                for outer in level
                for inner in outer
                if isinstance(inner, (dict, list))
            ]
            if not level:
                return found
    except RecursionError:
        pass
    except UnicodeEncodeError as error:
        raise ValueError(f"{Path(path).name} holds half of a surrogate pair, which is no letter") from error
    raise ValueError(f"{Path(path).name} is nested more than {_DEEPEST} levels deep") from None
