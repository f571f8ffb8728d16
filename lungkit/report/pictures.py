"""Pictures accompany results: one that cannot be drawn is a warning and fails neither a scan nor a training."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lungkit.errors import LungkitError, ResourceError
from lungkit.report.html.page import is_ours

_LOG = logging.getLogger("lungkit")


@contextlib.contextmanager
def optional_picture(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever goes wrong while ``path`` is drawn into a warning that names it; an older picture there goes.

    ``path`` may be a folder of pictures, which stays.

    Raises:
        ResourceError: the disk is full, which what follows would meet as well.

    Example:
        >>> with optional_picture("preview.png"):
        ...     raise RuntimeError("no fonts")
    """
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)
        _LOG.warning("%s: the picture was not drawn (%s: %s)", path, type(error).__name__, error)


@contextlib.contextmanager
def optional_page(path: str | os.PathLike[str]) -> Iterator[None]:
    """As :func:`optional_picture`, for a page: an older one of ours goes, a file of others stays.

    Raises:
        ResourceError: the disk is full.

    Example:
        >>> with optional_page("report.html"):
        ...     raise RuntimeError("no browser")
    """
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:
        if is_ours(Path(path)):
            with contextlib.suppress(OSError):
                Path(path).unlink()
        known = isinstance(error, LungkitError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        _LOG.warning("%s: the page was not written (%s)", path, message)
