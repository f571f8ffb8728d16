"""pydicom and highdicom, imported when a DICOM file is first touched and kept quiet about what they read."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import warnings
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


class _Quiet:
    """Counts those inside, so that threads which read at the same time do not restore what others still need."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._undo.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            # A child logger hands its records to the handlers of all ancestors: the parent's level does not hold it.
            for name, logger in list(logging.Logger.manager.loggerDict.items()):
                if name.partition(".")[0] in ("pydicom", "highdicom") and isinstance(logger, logging.Logger):
                    self._undo.callback(setattr, logger, "disabled", logger.disabled)
                    logger.disabled = True

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()


quiet = _Quiet()
"""``with quiet:`` holds back warnings and log records of pydicom and highdicom: they quote values, names included."""
