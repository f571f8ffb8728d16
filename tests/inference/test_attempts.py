"""Which ways are tried to predict a scan, and what is kept of one that failed."""

from __future__ import annotations

import weakref

import pytest
import torch

from lungkit.errors import DataError, ResourceError
from lungkit.inference.attempts import attempts
from lungkit.inference.scan_scores import NotFiniteError

CPU, META = torch.device("cpu"), torch.device("meta")


def tried(device, errors, notes):
    """Device, halvings and precision of every attempt, of which the first end with ``errors``."""
    found = []
    remaining = iter(errors)
    for attempt in attempts("scan", device, lambda device: "bf16", notes):
        with attempt:
            found.append((attempt.device.type, attempt.halvings, attempt.precision))
            if (error := next(remaining, None)) is not None:
                raise error
    return found


def test_one_that_does_not_fail_is_the_last():
    notes = []
    assert tried(CPU, [], notes) == [("cpu", 0, "bf16")] and not notes


def test_patches_are_halved_twice_and_then_the_cpu_takes_over():
    notes = []
    found = tried(
        META, [torch.OutOfMemoryError(), MemoryError(), RuntimeError("DefaultCPUAllocator: no")], notes
    )
    assert found == [("meta", 0, "bf16"), ("meta", 1, "bf16"), ("meta", 2, "bf16"), ("cpu", 0, "bf16")]
    assert len(notes) == 3 and all("meta ran out of memory" in note for note in notes)


def test_numbers_that_are_not_finite_are_computed_in_fp32_from_then_on():
    notes = []
    found = tried(CPU, [NotFiniteError("m"), MemoryError()], notes)
    assert found == [("cpu", 0, "bf16"), ("cpu", 0, "fp32"), ("cpu", 1, "fp32")]
    assert notes[0] == "m gave NaN or infinity in bf16; predicted in fp32"


@pytest.mark.parametrize(
    ("errors", "raised", "message"),
    [
        ([NotFiniteError("m")] * 2, DataError, "scan: m gives NaN or infinity"),
        ([MemoryError()] * 3, ResourceError, "scan: out of memory even with the smallest patches"),
        ([KeyError("elsewhere")], KeyError, "elsewhere"),
    ],
)
def test_what_no_other_attempt_mends_is_raised(errors, raised, message):
    with pytest.raises(raised, match=message):
        tried(CPU, errors, [])


def test_the_memory_of_an_attempt_is_free_when_the_next_one_begins():
    def fail():
        slab = torch.zeros(8)
        slabs.append(weakref.ref(slab))
        raise MemoryError

    slabs, count = [], 0
    for attempt in attempts("scan", CPU, lambda device: "fp32", []):
        with attempt:
            count += 1
            assert all(slab() is None for slab in slabs)
            if count < 3:
                fail()
    assert len(slabs) == 2
