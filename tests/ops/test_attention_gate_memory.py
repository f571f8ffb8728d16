"""attention_gate on a level of a real network: memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from attention_gate_providers import AttentionGateCase
from harness import OURS
from peak_memory import MemoryWorker

from lungkit.ops import _library


@pytest.fixture(scope="module")
def memory_worker() -> Iterator[MemoryWorker]:
    with MemoryWorker() as worker:
        yield worker


@pytest.mark.skipif("sys.platform != 'linux'", reason="peak memory on the CPU is measured on Linux only")
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_beyond_inputs_outputs_and_gradients_is_below_5_percent_of_x(memory_worker, threads):
    if not _library.is_native("attention_gate", "cpu"):
        pytest.skip(f"the twin runs here: {_library.CPU_LIBRARY.reason}")
    case = AttentionGateCase("cpu", threads, 32, 16, (96, 96, 96))
    peaks = memory_worker.measure(case, [OURS])[OURS]
    assert max(peaks.values()) < 0.05 * case.main_bytes()
