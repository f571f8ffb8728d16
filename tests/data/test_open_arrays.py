"""Few files open at a time, however many cases there are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lungkit.data.open_arrays import OpenArrays
from lungkit.errors import ResourceError


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    for number in range(40):
        np.save(tmp_path / f"{number:02d}.npy", np.full(5, number))
    return sorted(tmp_path.glob("*.npy"))


def test_those_used_last_stay_open(paths: list[Path]) -> None:
    arrays = OpenArrays(limit=3)
    first = arrays.get(0, paths[0])
    for number in (1, 2, 0, 3):
        arrays.get(number, paths[number])
    assert len(arrays) == 3
    assert arrays.get(0, paths[0]) is first
    assert arrays.get(1, paths[1])[0] == 1


def test_an_array_in_use_outlives_its_place(paths: list[Path]) -> None:
    arrays = OpenArrays(limit=1)
    first = arrays.get(0, paths[0])
    arrays.get(1, paths[1])
    assert first.tolist() == [0] * 5


def test_threads_get_the_right_array(paths: list[Path]) -> None:
    arrays = OpenArrays(limit=2)
    wrong = []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 40, 200).tolist():
            if (arrays.get(number, paths[number]) != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(arrays) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits of open files")
@pytest.mark.parametrize("limit", [64, 256])
def test_cases_without_end_fit_the_limit_of_open_files(paths: list[Path], limit: int) -> None:
    """In a process of its own: three arrays a case, hundreds of cases, and 30 files for everything else."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
from pathlib import Path
from lungkit.data.cache import CachedCase
import numpy as np
folder = Path({str(paths[0].parent)!r})
cases = []
for number in range(300):
    directory = folder / str(number)
    directory.mkdir()
    for name in ("image", "label", "foreground"):
        np.save(directory / f"{{name}}.npy", np.full(3, number))
    cases.append(CachedCase(str(number), directory, (1, 1, 3), (1.0, 1.0, 1.0), 1.0, 0.0, (3,)))
for _ in range(2):
    for number, case in enumerate(cases):
        assert (case.image == number).all() and (case.label == number).all() and (case.foreground == number).all()
held = [open("/dev/null") for _ in range(30)]
maps = Path("/proc/self/maps")
assert not maps.exists() or maps.read_text().count(".npy") <= {limit}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_that_is_gone_or_damaged_is_a_resource_error(paths: list[Path]) -> None:
    arrays = OpenArrays()
    with pytest.raises(ResourceError, match="was the cache removed"):
        arrays.get("absent", paths[0].with_name("absent.npy"))
    paths[0].write_bytes(b"\x93NUMPY")
    with pytest.raises(ResourceError, match="damaged"):
        arrays.get(0, paths[0])


def test_too_many_open_files_are_called_that(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(np, "load", full)
    with pytest.raises(ResourceError, match="ulimit -n"):
        OpenArrays().get(0, paths[0])
