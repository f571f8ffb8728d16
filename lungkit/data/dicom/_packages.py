"""pydicom and highdicom, imported when a DICOM file is first touched and kept quiet about what they read."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from lungkit.errors import UsageError


def require(module: str) -> Any:
    """Import ``module`` (pydicom, highdicom or a part of them).

    Raises:
        UsageError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UsageError(f"DICOM needs {package} ({error}): pip install 'lungkit[dicom]'") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings and log records of pydicom and highdicom: they quote values, names of patients included."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    # Child loggers hand their records to the handlers of all ancestors, so a level on the parent is not enough.
    loggers += [
        logger
        for name, logger in list(logging.Logger.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and name.startswith(("pydicom.", "highdicom."))
    ]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.disabled = True
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled
