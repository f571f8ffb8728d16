"""Fixtures of the op tests: every instruction set of the CPU kernels, and the CUDA kernels on the CPU emulator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.emulator import Emulator
from native_build import SANITIZED, build, build_sanitized
from op_kernels import (
    CPU,
    CUDA,
    EMULATED,
    Schedules,
    device_op,
    emulated_op,
    kernel_param,
    rerouted,
    schedules_of,
)

from lungkit.ops import _library


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    """The emulated kernels; under ASan and UBSan in the process that test_sanitized.py starts."""
    folder = build_sanitized("lungkit_emulated") if SANITIZED in os.environ else build("lungkit_emulated")
    return folder / "lungkit_emulated.so"


@pytest.fixture(params=[kernel_param(kernel) for kernel in (*CPU, *EMULATED, *CUDA)])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each set of kernels: instruction sets, the emulator in three thread orders, a CUDA device."""
    name = request.param
    if name in CPU:
        if name not in _library.available_isas():
            pytest.skip(f"no {name} kernels here: {_library.CPU_LIBRARY.reason or 'the processor lacks it'}")
        with _library.use_isa(name):
            yield name
    elif name in EMULATED:
        emulator: Emulator = request.getfixturevalue("emulator")
        with emulator.order(name.removeprefix("emulated-"), seed=1), rerouted(emulated_op):
            yield name
    else:
        skip_without_cuda_library()
        with rerouted(device_op):
            yield name


@pytest.fixture(scope="session")
def emulator(emulated_library: Path) -> Emulator:
    """Control of the emulator; the library is loaded."""
    torch.ops.load_library(str(emulated_library))
    return Emulator(emulated_library)


@pytest.fixture(params=[kernel_param(backend) for backend in ("cpu", "emulated", "cuda")])
def schedules(request: pytest.FixtureRequest) -> Iterator[Schedules]:
    """Everything that may schedule a kernel's parts differently, on each backend; results must not depend on it."""
    if request.param == "cpu":
        yield schedules_of("cpu")
    elif request.param == "emulated":
        emulator: Emulator = request.getfixturevalue("emulator")
        with rerouted(emulated_op):
            yield schedules_of("emulated", emulator)
    else:
        skip_without_cuda_library()
        with rerouted(device_op):
            yield schedules_of("cuda")


def skip_without_cuda_library() -> None:
    if not _library.CUDA_LIBRARY.loaded:
        pytest.skip(f"no CUDA kernels here: {_library.CUDA_LIBRARY.reason}")
