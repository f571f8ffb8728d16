"""Control of a library of emulated CUDA kernels: the order of threads, counts of launches."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ORDERS = ("forward", "reverse", "random")


class Statistics(ctypes.Structure):
    """Totals since the library was loaded, or between two moments."""

    _fields_ = (
        ("launches", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("threads", ctypes.c_uint64),
        ("switches", ctypes.c_uint64),
        ("products", ctypes.c_uint64),
        ("copied_bytes", ctypes.c_uint64),
        ("attributes", ctypes.c_uint64),
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
    def device(self, capability: int) -> Iterator[None]:
        """Runs on a device of this compute capability (86: 8.6), with its limits; on 9.0 again afterwards."""
        if not self._library.lungkit_emulator_set_device(capability):
            raise ValueError(f"the emulator knows no device of compute capability {capability}")
        try:
            yield
        finally:
            self._library.lungkit_emulator_set_device(90)

    @contextmanager
    def counted(self) -> Iterator[Statistics]:
        """What the body launches; filled in when the body ends."""
        counts = Statistics()
        before = self._library.lungkit_emulator_statistics()
        yield counts
        after = self._library.lungkit_emulator_statistics()
        for name, _ in Statistics._fields_:
            setattr(counts, name, getattr(after, name) - getattr(before, name))
