"""What every benchmark shares: cases, providers, and a measurement that takes turns.

A *case* is one problem (sizes, dtypes, threads, device); a *provider* is one way to solve it. All providers of a case
work on the same tensors and are measured in rounds: each round runs every provider once, in an order that rotates. A
machine that slows down for a while then slows all of them, and the ratios, formed within each round, hold. One run
gives three figures: forward (as in training, with the graph recorded), backward, and both, from the start of the one to
the end of the other.

``copy`` takes part in the rounds like a provider: it copies as many bytes as the case must move at least. The share of
the copy bandwidth is its time over a provider's time. Plain copies read what they write into the cache first, so a
kernel that mostly reads may pass 100 %.
"""

from __future__ import annotations

import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
import torch._inductor.config
from torch import Tensor

MODES = ("forward", "backward", "both")
COPY = "copy"
OURS = "lungkit"
COMPILED = "compiled"
_L2_BYTES = 256 * 2**20  # more than the cache of any GPU


@dataclass(frozen=True)
class Provider:
    """One way to solve a case: ``backward`` takes what ``forward`` returned and returns the gradients."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Case(ABC):
    """One problem. Subclasses live in modules of their own, not in test files: another process builds them too."""

    device: str
    threads: int

    op: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = MODES

    @property
    @abstractmethod
    def label(self) -> str:
        """Sizes and types, in the words of the table."""

    @property
    @abstractmethod
    def providers(self) -> tuple[str, ...]:
        """Names, ours first."""

    @abstractmethod
    def inputs(self) -> Any:
        """Tensors of the case, the same on every call; made once and handed to every provider."""

    @abstractmethod
    def build(self, provider: str, inputs: Any) -> Provider:
        """The provider of that name; an ``ImportError`` leaves it out."""

    def main_bytes(self) -> int | None:
        """Bytes of the tensor that memory is compared with, the logits or the features; None for a whole network."""
        return None

    def fewest_bytes(self) -> Mapping[str, int] | None:
        """Bytes that forward and backward must read and write at least; None where that is not counted."""
        return None

    def flops(self) -> Mapping[str, float] | None:
        """Multiplications and additions of the matrix products; None where they do not bind."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def id(self) -> str:
        threads = f"{self.threads}t-" if self.device == "cpu" else ""
        return f"{self.device}-{threads}{self.label}".replace(" ", "-").replace(",", "")


@dataclass
class Samples:
    """Seconds of one provider, one entry a round."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def of(self, mode: str) -> list[float]:
        if mode == "both":
            return [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        return self.forward if mode == "forward" else self.backward


@dataclass
class Measured:
    """What the rounds of one case gave; ``left_out`` says why a provider is missing."""

    samples: dict[str, Samples]
    launches: dict[str, dict[str, int]]
    left_out: dict[str, str]


def measure(case: Case, names: Sequence[str], *, seconds: float, rounds: int) -> Measured:
    """Times ``names`` and ``copy`` in turns, for ``seconds`` and at least ``rounds`` rounds."""
    inputs = case.inputs()
    lap = _cuda_lap if case.device == "cuda" else _cpu_lap
    providers: dict[str, Provider] = {}
    left_out: dict[str, str] = {}
    launches: dict[str, dict[str, int]] = {}
    with running(case):
        for name in names:
            try:
                provider = case.build(name, inputs)
                for _ in range(3):  # the first compiles, the second and third fill caches
                    lap(provider)
            except ImportError as error:
                left_out[name] = f"not installed: {error.name}"
            except torch.OutOfMemoryError:
                left_out[name] = "out of memory"
            except AssertionError as error:
                # torch's compiler checks what its operators give: not every network of others passes.
                if COMPILED not in name or name.startswith(OURS):
                    raise
                left_out[name] = f"does not run compiled: {str(error).partition(chr(10))[0]}"
            else:
                providers[name] = provider
                if case.device == "cuda":
                    launches[name] = _launches(provider)
        if case.fewest_bytes() is not None:
            providers[COPY] = _copy(case)
            lap(providers[COPY])
        samples = {name: Samples() for name in providers}
        order = list(providers)
        with _no_garbage_collection():
            end = time.perf_counter() + seconds
            done = 0
            while done < rounds or time.perf_counter() < end:
                for name in order:
                    forward, backward = lap(providers[name])
                    samples[name].forward.append(forward)
                    samples[name].backward.append(backward)
                order.append(order.pop(0))
                done += 1
    return Measured(samples, launches, left_out)


@contextmanager
def running(case: Case) -> Iterator[None]:
    """The case's number of threads, for the library and for code that inductor compiles."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    torch._dynamo.reset()  # compiled code keeps the number of threads it was compiled for
    try:
        # Compiling by processes of its own, as is usual, would leave them running beside what is timed.
        with torch._inductor.config.patch({"cpp.threads": case.threads, "compile_threads": 1}):
            yield
    finally:
        torch.set_num_threads(before)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


@cache
def flops_per_second(device: str, threads: int, dtype: torch.dtype) -> float:
    """Arithmetic peak as the library's product of two square matrices reaches it."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    lap = _cuda_lap if device == "cuda" else _cpu_lap
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = [lap(Provider(lambda: a @ b))[0] for _ in range(12)][2:]
    torch.set_num_threads(before)
    return 2.0 * size**3 / statistics.median(seconds)


def _copy(case: Case) -> Provider:
    """Moves the fewest bytes of each mode: half of them read, half of them written."""
    fewest = case.fewest_bytes()
    tensors = {
        mode: tuple(torch.ones(max(count // 8, 1), device=case.device) for _ in range(2))
        for mode, count in fewest.items()
    }

    def run(mode: str) -> None:
        source, target = tensors[mode]
        target.copy_(source)

    return Provider(lambda: run("forward"), (lambda _: run("backward")) if "backward" in fewest else None)


def _cpu_lap(provider: Provider) -> tuple[float, float]:
    start = time.perf_counter()
    result = provider.forward()
    middle = time.perf_counter()
    if provider.backward is not None:
        provider.backward(result)
    return middle - start, time.perf_counter() - middle


def _cuda_lap(provider: Provider) -> tuple[float, float]:
    """GPU time between events. Clearing the cache first also hides the time that the CPU takes to launch."""
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    _l2().zero_()
    marks[0].record()
    result = provider.forward()
    marks[1].record()
    if provider.backward is not None:
        provider.backward(result)
    marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3


@cache
def _l2() -> Tensor:
    return torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda")


def _launches(provider: Provider) -> dict[str, int]:
    """Kernels, copies and fills that one run puts on the device, by mode."""

    def count(run: Callable[[], Any]) -> tuple[int, Any]:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            result = run()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()), result

    forward, result = count(provider.forward)
    backward = 0 if provider.backward is None else count(lambda: provider.backward(result))[0]
    return {"forward": forward, "backward": backward, "both": forward + backward}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
