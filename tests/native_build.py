"""Libraries that the tests compile: csrc's CUDA kernels for the CPU emulator, and all kernels under the sanitizers."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZED = "LUNGKIT_TEST_SANITIZED"  # set by test_sanitized.py for the tests that it runs again
_REPOSITORY = Path(__file__).resolve().parents[1]


def build(*targets: str) -> Path:
    """Compiles them, incrementally; returns the folder that holds them."""
    return _build("emulator", targets)


def build_counted() -> Path:
    """The emulated kernels that count what they do: lungkit_counted, with gcov's notes beside its object files."""
    if shutil.which("gcov") is None or shutil.which("nm") is None:
        pytest.skip("what kernels do is counted with gcov and named by nm")
    return _build("emulator", ("lungkit_counted",)) / "lungkit_counted.so"


def build_sanitized(*targets: str) -> Path:
    """The same under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return _build("emulator-sanitized", targets, "-DLUNGKIT_SANITIZE=ON")


def _build(name: str, targets: tuple[str, ...], *options: str) -> Path:
    folder = _REPOSITORY / "build" / name
    # The environment's own CMake, where there is one: the machine's may be too old.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = [tool for tool in ("g++", "cmake") if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"the CUDA emulator needs {' and '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    with (folder / "lock").open("w") as lock:  # several pytest workers share one build
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", str(_REPOSITORY), "-B", str(folder), *generator, "-DLUNGKIT_CUDA=OFF",
             "-DLUNGKIT_EMULATOR=ON", f"-DLUNGKIT_TORCH_DIR={torch_folder}", *options],
            ["cmake", "--build", str(folder), "--target", *targets],
        ):  # fmt: skip
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"PATH": path}, check=False
            )
            assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"
    return folder
