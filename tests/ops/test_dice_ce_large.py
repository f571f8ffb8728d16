"""dice_ce on large inputs: memory, and offsets that 32-bit integers do not hold."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from dice_ce_cases import Form, assert_matches_twin, gradient_of, random_indices, random_logits
from dice_ce_providers import DiceCECase
from harness import OURS
from native_build import SANITIZED
from op_kernels import on_kernels, on_the_emulator
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
FAR = [
    ((2, 200), (2**31 + 64, 1000, 1)),
    ((2, 200), (2000, 2**31 + 64, 1)),
    ((2, 200), (1, 2, 2**24)),
]
FAR_IN_TWO_KERNELS = [((2, 192), (2**31 + 64, 192, 1)), ((2, 35), (2**31 + 64, 35, 1))]


@on_kernels("shape, strides", FAR, emulated=[*FAR[:2], *FAR_IN_TWO_KERNELS], cuda=[])
def test_offsets_beyond_32_bits(kernels, shape, strides):
    logits, labels = random_logits(shape, 2, torch.float16), random_indices(shape, 2, torch.uint8)
    far, far_labels = spread(logits, strides), spread(labels, (strides[0], strides[2]))
    assert torch.equal(dice_ce_statistics(far, far_labels), dice_ce_statistics(logits, labels))
    assert torch.equal(gradient_of(dice_ce_loss, far, far_labels), gradient_of(dice_ce_loss, logits, labels))


@on_the_emulator
def test_a_voxel_stride_beyond_32_bits_equals_the_twin(kernels):
    """Logits that lie so take another CUDA kernel than dense ones, whose sums have another order."""
    logits, labels = random_logits((2, 200), 2, torch.float16), random_indices((2, 200), 2, torch.uint8)
    assert_matches_twin(spread(logits, (1, 2, 2**24)), spread(labels, (1, 2**24)), Form())


def spread(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A copy with these strides."""
    if SANITIZED in os.environ:
        pytest.skip("the sanitizer keeps a byte for every eight, touched or not")
    return torch.empty(2**32, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)
