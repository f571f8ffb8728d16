"""Every op called directly with random tensors: the twin's result, or a refusal at the op's own door.

Half of the calls have one argument spoilt: another shape, dtype or device, another number. Under the sanitizers
(test_sanitized.py) the same calls show that nothing is read or written outside of a tensor.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuzzing import tries
from op_arguments import ARGUMENTS, Draw
from torch import Tensor

import lungkit.ops.norm_act  # noqa: F401  # defines its ops; lungkit.ops imports the others
from lungkit.ops import _library

# Of the largest value of a result, by the least exact of its arguments.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_DIFFERENTIABLE = [0, 1, 3, 4]  # rows of the statistics that depend on the logits
REFUSALS = (RuntimeError, ValueError, TypeError)


def test_every_op_has_its_arguments_here() -> None:
    assert set(ARGUMENTS) == set(_library.defined_ops())


@pytest.mark.filterwarnings("ignore:var_mean")  # of no voxel at all
@pytest.mark.parametrize("name", ARGUMENTS)
def test_right_and_spoilt_arguments(kernels: str, name: str) -> None:
    refused = 0
    for seed in range(tries(12 if kernels.startswith("emulated") else 40)):
        draw = Draw(seed)
        arguments = ARGUMENTS[name](draw)
        spoilt = seed % 2 == 1
        if spoilt:
            arguments = draw.spoilt(arguments)
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if all(tensor.is_meta for tensor in tensors):
            continue  # the dispatcher would never ask a kernel of the CPU
        # Beside no channel or no voxel PyTorch's own functions raise, or drop an axis.
        empty = any(not tensor.numel() for tensor in tensors)
        allowed = max(TOLERANCE.get(tensor.dtype, 0) for tensor in tensors)
        exact = [_copy(value, torch.float64) for value in arguments]
        changing = [_copy(value) for value in arguments] if name.endswith("_") else arguments
        try:
            found = _as_tuple(_on_key("CPU", name, changing))
        except REFUSALS as error:
            assert spoilt or _may_be_refused(kernels, name, error), f"seed {seed}: {error}"
            assert len(str(error)) > 20, seed
            refused += 1
            continue
        if any(isinstance(value, float) and not abs(value) < 100 for value in arguments):
            continue  # beyond the range of one of the types
        if name.endswith("_"):
            found = (changing[0],)
        try:
            expected = _as_tuple(_on_key("CompositeExplicitAutograd", name, exact))
        except REFUSALS as error:
            assert spoilt or empty, f"{seed}: {error}"
            continue
        expected = (exact[0],) if name.endswith("_") else expected
        if name == "dice_ce_loss":
            found, expected = ((loss, slopes[_DIFFERENTIABLE]) for loss, slopes in (found, expected))
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            if empty and ours.shape != theirs.shape:
                continue
            _assert_near(ours, theirs, allowed, f"result {number} of seed {seed}")
    assert refused, "no spoilt argument was noticed"


def _may_be_refused(kernels: str, name: str, error: Exception) -> bool:
    """The CUDA kernels of the gate lack float64 and wide levels, which lungkit gives to the library's products."""
    return kernels.startswith(("emulated", "cuda")) and "the CUDA kernels take" in str(error)


def _copy(value: Any, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone().to(dtype) if dtype is not None and value.is_floating_point() else value.clone()


def _on_key(key: str, name: str, arguments: list[Any]) -> Any:
    """The kernel of a key, which then has to notice a tensor of another device by itself."""
    return getattr(torch.ops.lungkit, name).default._op_dk(getattr(torch._C.DispatchKey, key), *arguments)


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results or ())


def _assert_near(found: Tensor, expected: Tensor, allowed: float, what: str) -> None:
    assert found.shape == expected.shape, what
    if found.is_meta or not expected.numel():
        return
    if not found.is_floating_point():
        assert torch.equal(found, expected), what
    elif bool(expected.isfinite().all()) and float(expected.abs().max()) < torch.finfo(found.dtype).max / 4:
        scale = max(1.0, float(expected.abs().max()))
        difference = float((found.double() - expected).abs().max()) / scale
        assert difference <= allowed, f"{what} differs by {difference:.2g}"
