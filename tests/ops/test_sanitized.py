"""The emulated CUDA kernels again, under AddressSanitizer and UndefinedBehaviorSanitizer.

The sanitizers' run-time has to be in the process from its start, so the tests run in a process of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from op_kernels import SANITIZED


@pytest.mark.timeout(2400)  # compiling every kernel under the sanitizers takes minutes on two cores
@pytest.mark.skipif(SANITIZED in os.environ, reason="this is the process that the sanitizers watch")
def test_emulated_kernels_are_clean_under_the_sanitizers():
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
    environment = os.environ | {
        SANITIZED: "1",
        "LD_PRELOAD": " ".join(run_times),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(Path(__file__).parent),
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-k", "emulated and random and not sanitizers"]
    # python -m looks in its own folder first: the root of a checkout without libraries would hide the installed lungkit
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
