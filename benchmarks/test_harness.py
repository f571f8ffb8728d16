"""The harness itself: that it measures what it says."""

from __future__ import annotations

import pytest
import torch
from harness import COMPILED, COPY, OURS, measure
from peak_memory import MemoryWorker
from sample_case import MIB, HeldMemory


def test_every_provider_and_the_copy_run_in_every_round() -> None:
    measured = measure(HeldMemory("cpu", 1), ["scratch", "missing"], seconds=0, rounds=3)
    lengths = {name: len(samples.of("both")) for name, samples in measured.samples.items()}
    assert lengths == {"scratch": 3, COPY: 3}


def test_a_provider_that_is_not_installed_is_left_out_with_a_reason() -> None:
    assert measure(HeldMemory("cpu", 1), ["missing"], seconds=0, rounds=1).left_out == {
        "missing": "not installed: missing"
    }


def test_a_network_of_others_that_the_compiler_refuses_is_left_out_and_ours_is_not() -> None:
    case, theirs, ours = HeldMemory("cpu", 1), f"theirs, {COMPILED}", f"{OURS}, {COMPILED}"
    assert measure(case, [theirs], seconds=0, rounds=1).left_out == {
        theirs: "does not run compiled: expected stride 1"
    }
    with pytest.raises(AssertionError, match="expected stride 1"):
        measure(case, [ours], seconds=0, rounds=1)


def test_threads_are_set_back() -> None:
    before = torch.get_num_threads()
    measure(HeldMemory("cpu", before + 1), ["scratch"], seconds=0, rounds=1)
    assert torch.get_num_threads() == before


@pytest.mark.skipif("sys.platform != 'linux'", reason="peak memory on the CPU is measured on Linux only")
def test_peak_memory_counts_native_scratch_and_leaves_out_what_is_returned() -> None:
    with MemoryWorker() as worker:
        peaks = worker.measure(HeldMemory("cpu", 1), ["scratch"])["scratch"]
    # 32 MiB of scratch beside the 16 MiB that are returned; in the backward the gradient takes the scratch's place.
    assert peaks["forward"] == pytest.approx(32 * MIB, abs=MIB)
