"""Memory maps of many files, of which few are open at a time.

A memory map keeps its file's descriptor open: three a case of a large dataset are more than the 1,024 (macOS: 256)
that a process may have.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from lungkit.errors import ResourceError

_FEWEST, _MOST = 16, 256


class OpenArrays:
    """Arrays in ``.npy`` files as memory maps; those used last stay open, up to ``limit`` of them.

    An array that is still in use when it gives way stays valid; it is closed with its last reference.

    Args:
        limit: None is a quarter of the files that the process may open, from 16 to 256.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.npy"
        >>> np.save(path, np.arange(3))
        >>> arrays = OpenArrays(limit=2)
        >>> arrays.get("a", path).tolist(), len(arrays)
        ([0, 1, 2], 1)
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = _default_limit() if limit is None else limit
        self._open: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            # Another thread may hold the lock when a worker process is made, and would never release it there.
            os.register_at_fork(after_in_child=self._renew_lock)

    def __len__(self) -> int:
        return len(self._open)

    def get(self, key: Hashable, path: Path) -> np.ndarray:
        """The array in ``path``, opened unless it is open under ``key``.

        Raises:
            ResourceError: it cannot be opened.
        """
        with self._lock:
            array = self._open.get(key)
            if array is None:
                array = self._open[key] = _map(path)
            self._open.move_to_end(key)
            while len(self._open) > self.limit:
                self._open.popitem(last=False)
        return array

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()


def _default_limit() -> int:
    with contextlib.suppress(ImportError):  # Windows
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if allowed != resource.RLIM_INFINITY:
            return max(_FEWEST, min(_MOST, allowed // 4))
    return _MOST


def _map(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        advice = "was the cache removed? prepare the case again"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            advice = "raise the number of open files (ulimit -n 4096)"
        elif error.errno == errno.ENOMEM:
            advice = "the machine allows no more memory maps (vm.max_map_count) or memory"
        raise ResourceError(f"{path}: cached array cannot be opened ({error}); {advice}") from error
    except ValueError as error:
        raise ResourceError(f"{path}: cached array is damaged ({error}); prepare the case again") from error
    return array
