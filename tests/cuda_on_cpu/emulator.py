"""Control of a library of emulated CUDA kernels: the order of threads, counts of launches, results in every order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

_Result = TypeVar("_Result", torch.Tensor, tuple[torch.Tensor, ...])

_ORDERS = ("forward", "reverse", "random")
_EVERY_ORDER = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))


class Statistics(ctypes.Structure):
    """Totals since the library was loaded, or between two moments."""

    _fields_ = (
        ("launches", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("threads", ctypes.c_uint64),
        ("switches", ctypes.c_uint64),
    )


class Emulator:
    """The emulator inside ``library``, a shared library that ``torch.ops.load_library`` has loaded or will load."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.lungkit_emulator_set_order.argtypes = (ctypes.c_int, ctypes.c_uint)
        self._library.lungkit_emulator_statistics.restype = Statistics

    @contextmanager
    def order(self, name: str, seed: int = 0) -> Iterator[None]:
        """Runs threads and blocks "forward", in "reverse" or at "random"; forward again afterwards."""
        self._library.lungkit_emulator_set_order(_ORDERS.index(name), seed)
        try:
            yield
        finally:
            self._library.lungkit_emulator_set_order(0, 0)

    @contextmanager
    def counted(self) -> Iterator[Statistics]:
        """What the body launches; filled in when the body ends."""
        counts = Statistics()
        before = self._library.lungkit_emulator_statistics()
        yield counts
        after = self._library.lungkit_emulator_statistics()
        for name, _ in Statistics._fields_:
            setattr(counts, name, getattr(after, name) - getattr(before, name))

    def in_every_order(self, call: Callable[[], _Result]) -> _Result:
        """The result of ``call``, which must have the same bits in every order of threads and blocks.

        A missing barrier, a data race between threads that barriers separate, and floating-point atomics give
        other bits in some order.
        """
        results = []
        for name, seed in _EVERY_ORDER:
            with self.order(name, seed):
                results.append(call())
        for (name, seed), result in zip(_EVERY_ORDER, results, strict=True):
            assert _bits(result) == _bits(results[0]), f"another result in the order {name} (seed {seed})"
        return results[0]


def _bits(result: torch.Tensor | tuple[torch.Tensor, ...]) -> list[list[int]]:
    tensors = (result,) if isinstance(result, torch.Tensor) else result
    return [tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist() for tensor in tensors]
