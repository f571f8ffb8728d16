"""Ways to predict a scan, from the best to the last resort: fp32 where bf16 fails, less memory where it runs out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from types import TracebackType

import torch

from lungkit.errors import DataError, ResourceError
from lungkit.inference.precision import Precision
from lungkit.inference.scan_scores import NotFiniteError

_LOG = logging.getLogger("lungkit")


class Attempt(contextlib.AbstractContextManager[None]):
    """One way to predict a scan; keeps an error inside the block from which another way may lead out."""

    def __init__(self, device: torch.device, halvings: int, precision: Precision, notes: list[str]) -> None:
        self.device, self.halvings, self.precision, self.notes = device, halvings, precision, notes
        self.error: BaseException | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return isinstance(error, NotFiniteError) or (error is not None and _is_out_of_memory(error))


def attempts(
    name: str, device: torch.device, precision_on: Callable[[torch.device], Precision], notes: list[str]
) -> Iterator[Attempt]:
    """Attempts until one does not fail: with smaller patches, at last on the CPU, where the memory runs out.

    Each is to be entered (``with attempt:``) and to be given up where the block ends with an error that another attempt
    may not have; what was made of the scan by then is void.

    Args:
        name: of the scan.
        device: where to begin.
        precision_on: number format on a device; fp32 is tried after one that overflows.
        notes: what to say of the prediction; grows.

    Raises:
        DataError: the network gives NaN or infinity in fp32.
        ResourceError: the memory does not suffice for the last attempt.
    """
    following = [(device, halvings) for halvings in range(3)]
    if device.type != "cpu":
        following.append((torch.device("cpu"), 0))
    device, halvings = following.pop(0)
    in_fp32 = False
    while True:
        attempt = Attempt(device, halvings, "fp32" if in_fp32 else precision_on(device), notes)
        yield attempt
        # Named nowhere else: an error holds the memory of what failed until the next attempt takes its place.
        if attempt.error is None:
            break
        if isinstance(attempt.error, NotFiniteError):
            if attempt.precision == "fp32":
                raise DataError(
                    f"{name}: {attempt.error} gives NaN or infinity for this scan, so there is no mask; look at "
                    "the scan's intensities and at the model's training"
                ) from attempt.error
            notes.append(f"{attempt.error} gave NaN or infinity in {attempt.precision}; predicted in fp32")
            in_fp32 = True
            continue
        _LOG.warning("%s is out of memory (%s)", device, str(attempt.error).partition("\n")[0])
        if not following:
            raise ResourceError(
                f"{name}: out of memory even with the smallest patches ({attempt.error}); free some memory"
            ) from attempt.error
        notes.append(f"{device.type} ran out of memory; predicted with smaller patches or on the CPU")
        device, halvings = following.pop(0)
    for note in notes:
        _LOG.warning("%s: %s", name, note)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
