"""dice_ce on large inputs: memory, and offsets that 32-bit integers do not hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from dice_ce_cases import gradient_of, random_indices, random_logits
from dice_ce_providers import DiceCECase
from harness import OURS
from peak_memory import MemoryWorker

from lungkit.ops import _library
from lungkit.ops.dice_ce import dice_ce_loss, dice_ce_statistics


@pytest.fixture(scope="module")
def memory_worker() -> Iterator[MemoryWorker]:
    with MemoryWorker() as worker:
        yield worker


@pytest.mark.skipif("sys.platform != 'linux'", reason="peak memory on the CPU is measured on Linux only")
@pytest.mark.parametrize("classes", [2, 5])
def test_memory_beyond_inputs_and_gradient_is_below_2_percent_of_the_logits(memory_worker, classes):
    if not _library.is_native("dice_ce_loss", "cpu"):
        pytest.skip(f"the twin runs here: {_library.CPU_LIBRARY.reason}")
    case = DiceCECase("cpu", 1, (2, classes, 128, 128, 128))
    peaks = memory_worker.measure(case, [OURS])[OURS]
    assert max(peaks.values()) < 0.02 * case.main_bytes()


# Batch stride, channel stride, voxel stride; the gaps between the elements are never touched and take no memory.
@pytest.mark.parametrize(
    "strides",
    [(2**31 + 64, 1000, 1), (2000, 2**31 + 64, 1), (1, 2, 2**24)],
    ids=["batch", "channel", "voxel"],
)
def test_offsets_beyond_32_bits(isa, strides):
    logits, labels = random_logits((2, 200), 2, torch.float16), random_indices((2, 200), 2, torch.uint8)
    far, far_labels = (
        torch.empty(2**32, dtype=like.dtype).as_strided(like.shape, steps).copy_(like)
        for like, steps in ((logits, strides), (labels, (strides[0], strides[2])))
    )
    assert torch.equal(dice_ce_statistics(far, far_labels), dice_ce_statistics(logits, labels))
    assert torch.equal(gradient_of(dice_ce_loss, far, far_labels), gradient_of(dice_ce_loss, logits, labels))
