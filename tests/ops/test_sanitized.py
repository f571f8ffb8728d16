"""The kernels of the CPU and the emulated CUDA kernels again, under AddressSanitizer and UndefinedBehaviorSanitizer.

The sanitizers' run-time has to be in the process from its start, so the tests run in a process of their own: there
``lungkit`` is a copy whose native libraries are built under the sanitizers.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_build import SANITIZED, build_sanitized

import lungkit
from lungkit.ops import _library


@pytest.mark.timeout(2400)  # compiling every kernel under the sanitizers takes minutes on two cores
@pytest.mark.skipif(SANITIZED in os.environ, reason="this is the process that the sanitizers watch")
def test_kernels_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    environment = os.environ | sanitizers() | {"PYTHONPATH": str(sanitized_package(tmp_path))}
    tests = Path(__file__).parent
    # python -m looks in its own folder first: the root of a checkout without libraries would hide the copy
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tests), str(tests.parent / "metrics" / "test_surface.py"),
         *("-q", "-x", "-p", "no:cacheprovider"),
         *("-k", "(emulated and random or fuzz or test_surface or watched) and not under_the_sanitizers")],
        capture_output=True, text=True, env=environment, cwd=tests, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(SANITIZED not in os.environ, reason="this is not the process that the sanitizers watch")
def test_watched_libraries_call_the_sanitizers() -> None:
    assert {"baseline", "avx2"} & set(_library.available_isas())
    libraries = [_library._NATIVE_FOLDER / "lungkit_cpu.so", *_library._NATIVE_FOLDER.glob("_geometry*.so")]
    for library in libraries:
        assert b"__asan_report" in library.read_bytes(), library
        assert b"__ubsan_handle" in library.read_bytes(), library


def sanitized_package(folder: Path) -> Path:
    """A folder for PYTHONPATH with a copy of lungkit whose native libraries report to the sanitizers."""
    geometry = ["_geometry"] if importlib.util.find_spec("pybind11") is not None else []
    built = build_sanitized("lungkit_cpu", *geometry, "lungkit_emulated")
    shutil.copytree(
        Path(lungkit.__file__).parent, folder / "lungkit", ignore=shutil.ignore_patterns("*.so", "*.pyc")
    )
    (folder / "lungkit" / "_native").mkdir(exist_ok=True)
    for library in (built / "lungkit_cpu.so", *built.glob("_geometry*.so")):
        shutil.copy(library, folder / "lungkit" / "_native")
    return folder


def sanitizers() -> dict[str, str]:
    """The environment of a process that they watch."""
    if shutil.which("g++") is None:
        pytest.skip("the CUDA emulator needs g++")
    run_times = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    missing = [path for path in run_times if not Path(path).is_absolute()]
    if missing:
        pytest.skip(f"g++ has no {' and no '.join(missing)}")
    return {
        SANITIZED: "1",
        "LD_PRELOAD": " ".join(run_times),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
