"""What emulated kernels do: the bytes of global memory that each launch touches, and how often each line runs.

From a library that is built for it (counting.h): a function before every load and every store, and gcov's counts.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Lines = Mapping[tuple[Path, int], int]  # how often the threads ran a line, by its file and number


class LaunchCounts(ctypes.Structure):
    """One launch, as counting.h says."""

    name: str  # of the kernel, mangled
    _fields_ = tuple(
        (field, ctypes.c_uint64)
        for field in (
            "kernel",
            "blocks",
            "threads",
            "shared_bytes",
            "products",
            "copied_bytes",
            "loaded_bytes",
            "stored_bytes",
            "different_loaded_bytes",
            "different_stored_bytes",
        )
    )


@dataclass(frozen=True)
class Counted:
    """A call of an op."""

    launches: tuple[LaunchCounts, ...]
    lines: Lines


class Counting:
    """The counts of ``library``, which ``torch.ops.load_library`` has loaded; ``scratch`` is gcov's own folder."""

    def __init__(self, library: Path, scratch: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.lungkit_emulator_end_counts.restype = ctypes.c_size_t
        self._library.lungkit_emulator_counts.argtypes = (ctypes.c_size_t,)
        self._library.lungkit_emulator_counts.restype = LaunchCounts
        self._scratch = scratch
        listed = subprocess.run(
            ["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True
        ).stdout
        self._names = {int(row[0], 16): row[2] for row in map(str.split, listed.splitlines())}

    def count(self, source: str, call: Callable[[], Any]) -> Counted:
        """What ``call`` of an op, whose folder of csrc is ``source``, launches, and the lines that it runs."""
        shutil.rmtree(self._scratch)
        self._scratch.mkdir()
        os.environ["GCOV_PREFIX"] = str(self._scratch)
        self._library.lungkit_emulator_begin_counts()
        try:
            call()
            launches = tuple(map(self._launch, range(self._library.lungkit_emulator_end_counts())))
        finally:
            del os.environ["GCOV_PREFIX"]
        return Counted(launches, self._lines(source))

    def _launch(self, index: int) -> LaunchCounts:
        counts: LaunchCounts = self._library.lungkit_emulator_counts(index)
        counts.name = self._names[counts.kernel]
        return counts

    def _lines(self, source: str) -> Lines:
        runs: Counter[tuple[Path, int]] = Counter()
        for data in self._scratch.rglob(f"csrc/{source}/*.gcda"):
            notes = data.with_suffix(".gcno")  # beside the object file, where gcov would have put the data
            notes.symlink_to(Path("/") / notes.relative_to(self._scratch))
            report = subprocess.run(
                [shutil.which("gcov") or "gcov", "--json-format", "--stdout", str(data)],
                capture_output=True, check=True, cwd=self._scratch,
            ).stdout  # fmt: skip
            for file in json.loads(report)["files"]:
                path = Path(os.path.normpath(file["file"]))
                for line in file["lines"]:
                    runs[path, line["line_number"]] += line["count"]
        return runs
