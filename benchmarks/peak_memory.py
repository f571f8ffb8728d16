"""Peak memory of a provider beyond its inputs, its outputs and the gradients that it returns.

CPU: the peak of the resident set (VmHWM of /proc/self/status, set back through /proc/self/clear_refs) over its size
before the call. That sees every page a call touches: torch's tensors, and the scratch of native code as well. One
worker process runs all cases; glibc is told to map every block of 64 KiB and more by itself and to give it back at
once, for otherwise a block that an earlier call freed would be used again unseen. So set, allocation is slower: timings
are taken elsewhere. The kernel counts in batches of pages, so figures are right to about 0.3 MiB; the least of three
calls counts. Linux only; elsewhere the figure is missing.

CUDA: ``torch.cuda.max_memory_allocated``, in this process.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from harness import Case, Provider, running
from torch import Tensor

_GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
_CALLS = 3


class MemoryWorker:
    """Measures peak memory; a context manager that ends its process."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> MemoryWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def measure(self, case: Case, names: Iterable[str]) -> dict[str, dict[str, int]]:
        """Bytes by provider and mode, forward and both; a provider that could not be measured is missing."""
        if case.device == "cuda":
            return _measure(case, tuple(names))
        if sys.platform != "linux":
            return {}
        if self._pool is None:
            before = {name: os.environ.get(name) for name in _GLIBC}
            os.environ.update(_GLIBC)
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            self._pool.submit(os.getpid).result()  # glibc reads its settings as the process starts
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        try:
            return self._pool.submit(_measure, case, tuple(names)).result()
        except BrokenProcessPool:  # the system ended it for want of memory
            self._pool = None
            return {}


def _measure(case: Case, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    inputs = case.inputs()
    beyond = _beyond_on_cuda if case.device == "cuda" else _beyond_on_cpu
    peaks: dict[str, dict[str, int]] = {}
    with running(case):
        for name in names:
            provider = case.build(name, inputs)
            _both(provider)
            peaks[name] = {"forward": beyond(provider.forward)}
            if provider.backward is not None:
                peaks[name]["both"] = beyond(lambda provider=provider: _both(provider))
    return peaks


def _both(provider: Provider) -> tuple[Any, Any]:
    result = provider.forward()
    return result, None if provider.backward is None else provider.backward(result)


def _beyond_on_cpu(run: Callable[[], Any]) -> int:
    figures = []
    for _ in range(_CALLS):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        result = run()
        figures.append(_status("VmHWM") - before - _bytes_of(result))
        del result
    return max(0, min(figures))


def _beyond_on_cuda(run: Callable[[], Any]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _bytes_of(result)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {name}")


def _bytes_of(result: Any) -> int:
    """Bytes of the tensors in nested tuples, each storage once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, tuple | list):
            for item in value:
                visit(item)

    visit(result)
    return sum(storages.values())
