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
        expected = None
        for name, seed in _EVERY_ORDER:
            with self.order(name, seed):
                result = call()
            if expected is None:
                expected = result
            same = all(map(_same_bits, _as_tuple(result), _as_tuple(expected)))
            assert same, f"another result in the order {name} (seed {seed}) than forward"
        return result


def _as_tuple(result: _Result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bytes_a, bytes_b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bytes_a, bytes_b)
